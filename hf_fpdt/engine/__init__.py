"""A layer and the loss, chunk by chunk: the paper.

In reading order:

    layer              the layer executor: a decoder layer run chunk by chunk, for any architecture (paper
    calls              what the registered attention function does inside a layer's own forward (paper sections
    layer_run          one call of one layer: what every chunk of it needs, and what its backward pass finds again
    whole              attention of whole tensors, differentiable: what the name "fpdt" means without the layer
    gradients          parameter gradients of one layer, or of the head, added up over chunks
    replay_state       state that a replay must find as the forward pass did: random generators, autocast
    trial              is a decoder layer what the executor takes it for? Each distinct one is tried on a few
    layer_state        how a layer is built and what it holds: what says whether it still is the layer that was
    loss               the head by chunks: final norm, logits and cross-entropy without a tensor of the size
    cross_entropy      cross-entropy of a chunk of logits together with its gradient, which is known as soon as
    cross_entropy_triton the Triton kernel of `cross_entropy`; imported only where Triton is
    progress           one line inside a long step: which layer and chunk, how fast, how long still. Quiet where
"""

from .calls import current_call
from .layer import run_layer
from .layer_run import LayerRun
from .layer_state import look_of
from .loss import Head, chunked_loss, norm_by_chunks, shifted
from .progress import StepProgress
from .replay_state import RandomState, modes_of, untouched_random_state
from .trial import TRIAL_TOKENS, LayerTrials, mixes_tokens, visit, visiting
from .whole import attend_whole

__all__ = [
    "Head",
    "LayerRun",
    "LayerTrials",
    "RandomState",
    "StepProgress",
    "TRIAL_TOKENS",
    "attend_whole",
    "chunked_loss",
    "current_call",
    "look_of",
    "mixes_tokens",
    "modes_of",
    "norm_by_chunks",
    "run_layer",
    "shifted",
    "untouched_random_state",
    "visit",
    "visiting",
]
