"""A layer and the loss, chunk by chunk: the paper.

In reading order:

    layer                 the chunk loop, forward and backward
    calls                 what attention does in each pass
    layer_run             a layer, and one call of it
    whole                 attention of whole tensors
    gradients             gradients of weights, summed over chunks
    replay_state          what a replay must find again: random numbers, autocast, modes
    recurrent             what recurrent layers hand from chunk to chunk
    trial                 may a layer be cut at all? Each distinct one is tried
    trial_run             one layer on a few random tokens
    unread                which values inside a layer nobody reads
    layer_state           what a layer was seen to do, how it is built, and whether it still is
    loss                  final norm, head and loss, chunk by chunk
    cross_entropy         the loss of a chunk with its gradient, in one kernel too
    log_probs             log-probabilities of tokens, chunk by chunk, for losses of one's own
    progress              the line inside a long step
"""

from .calls import current_call
from .layer import run_layer
from .layer_run import Layer, LayerRun
from .layer_state import Asked, LayerTraits, hooks_everywhere, hooks_of, is_fsdps, look_of
from .log_probs import STATISTICS, LastUse, LogProbs, chunked_log_probs
from .loss import Head, chunked_loss, norm_by_chunks
from .progress import StepProgress
from .recurrent import StandInCache, cache_argument, plain_kernels, scan_packages
from .replay_state import RandomState, untouched_random_state
from .trial import LayerTrials, mixes_tokens, traits_without_memory, visit, visiting
from .trial_run import TRIAL_TOKENS
from .whole import attend_documents, attend_whole

__all__ = [
    "Asked",
    "Head",
    "LastUse",
    "LogProbs",
    "Layer",
    "LayerRun",
    "LayerTraits",
    "LayerTrials",
    "RandomState",
    "STATISTICS",
    "StandInCache",
    "StepProgress",
    "TRIAL_TOKENS",
    "attend_documents",
    "attend_whole",
    "cache_argument",
    "chunked_log_probs",
    "chunked_loss",
    "current_call",
    "hooks_everywhere",
    "hooks_of",
    "is_fsdps",
    "look_of",
    "mixes_tokens",
    "norm_by_chunks",
    "plain_kernels",
    "run_layer",
    "scan_packages",
    "traits_without_memory",
    "untouched_random_state",
    "visit",
    "visiting",
]
