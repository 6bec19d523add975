"""What one step keeps, where, and what it computes. Integers only; no torch.

In reading order:

    sizes              how many bytes a training step needs: what layers would keep, K and V, and what grows on
    by_layer           attributes of a transformers configuration whose layers may differ
    checkpointing      what one pass keeps of its layers for the backward pass: the rule of checkpoints, in whole
    tiers              which tier an entry of the stores goes to. Integers only; no torch
    rehearsal          A step rehearsed with numbers in place of tensors, in the executor's own order: what it
    placement          what a step may hold where, and what it keeps: "auto" resolved, checked before anything is
    operations         operations of a chunk, a pass and a step: all that are run, and those that strict MFU
    optimizers         bytes an optimizer takes for each weight that trains
"""

from .by_layer import (
    LayersDiffer,
    attention_sizes,
    by_layer,
    head_dims,
    largest,
    layer_lists,
    layer_overrides,
    layer_sets,
    one_value,
    take_layers,
    why_no_sizes,
)
from .checkpointing import KeptLayers, forward_bytes
from .operations import BACKWARD_OPERATIONS, WorkPhase, chunk_work, pass_work, strict_flops
from .optimizers import OPTIMIZERS, state_bytes, sum_bytes
from .placement import (
    DEVICE_MARGIN,
    DEVICE_RESERVE,
    HOST_RESERVE,
    NO_LIMIT,
    Available,
    PassPlacement,
    budgets_of,
    described,
    plan_pass,
)
from .rehearsal import Rehearsal, pool_of_numbers
from .sizes import KVBytes, ModelSizes, Phase, StepSizes
from .tiers import (
    LOOKAHEAD,
    SOON,
    STAGING_BUFFERS,
    Budgets,
    BufferPool,
    ExistingBuffers,
    ForwardOrder,
    Observer,
    Slot,
    Tier,
    TierAllocator,
)

__all__ = [
    "Available",
    "BACKWARD_OPERATIONS",
    "Budgets",
    "BufferPool",
    "DEVICE_MARGIN",
    "DEVICE_RESERVE",
    "ExistingBuffers",
    "ForwardOrder",
    "HOST_RESERVE",
    "KVBytes",
    "KeptLayers",
    "LOOKAHEAD",
    "LayersDiffer",
    "ModelSizes",
    "NO_LIMIT",
    "OPTIMIZERS",
    "Observer",
    "PassPlacement",
    "Phase",
    "Rehearsal",
    "SOON",
    "STAGING_BUFFERS",
    "Slot",
    "StepSizes",
    "Tier",
    "TierAllocator",
    "WorkPhase",
    "attention_sizes",
    "budgets_of",
    "by_layer",
    "chunk_work",
    "described",
    "forward_bytes",
    "head_dims",
    "largest",
    "layer_lists",
    "layer_overrides",
    "layer_sets",
    "one_value",
    "pass_work",
    "plan_pass",
    "pool_of_numbers",
    "state_bytes",
    "strict_flops",
    "sum_bytes",
    "take_layers",
    "why_no_sizes",
]
