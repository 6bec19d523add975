"""What one step keeps, where, and what it computes. Integers only; no torch.

In reading order:

    by_layer       a configuration's sizes, layer by layer
    model_sizes    what the arithmetic needs to know of a model
    kv_bytes       bytes of one layer's K and V
    sizes          bytes of a step: of a layer, K and V, and what grows on the GPU
    layer_bytes    bytes of what one layer may keep
    checkpointing  the rule of what each layer keeps for its backward pass
    linears        which outputs of linears it keeps besides
    tiers          the allocator: GPU, pinned host buffers, files
    rehearsal      a step played with numbers, to know its peaks before it runs
    placement      "auto" resolved: budgets, and the fastest placement that they hold
    operations     operations of a chunk and of a step; strict MFU
    optimizers     bytes an optimizer takes for each weight
"""

from .by_layer import (
    AttentionSizes,
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
    windows_of,
)
from .checkpointing import KeptChunks, KeptLayers, forward_bytes, forward_order, linear_bytes
from .kv_bytes import KVBytes
from .layer_bytes import LinearBytes
from .linears import KEEPS_LINEARS, saved_of, saved_operations, under_way_bytes
from .model_sizes import CONV, LayerMix, LinearSize, ModelSizes, StateSize
from .operations import (
    BACKWARD_OPERATIONS,
    Work,
    WorkPhase,
    attention_of_all,
    chunk_work,
    pass_work,
    spared_operations,
    strict_flops,
)
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
    described_kv,
    described_windows,
    has_room,
    linear_share,
    plan_pass,
)
from .rehearsal import Rehearsal, pool_of_numbers
from .sizes import Phase, StepSizes
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
    "AttentionSizes",
    "Available",
    "BACKWARD_OPERATIONS",
    "Budgets",
    "BufferPool",
    "CONV",
    "DEVICE_MARGIN",
    "DEVICE_RESERVE",
    "ExistingBuffers",
    "ForwardOrder",
    "HOST_RESERVE",
    "KEEPS_LINEARS",
    "KVBytes",
    "KeptChunks",
    "KeptLayers",
    "LOOKAHEAD",
    "LayerMix",
    "LayersDiffer",
    "LinearBytes",
    "LinearSize",
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
    "StateSize",
    "StepSizes",
    "Tier",
    "TierAllocator",
    "Work",
    "WorkPhase",
    "attention_of_all",
    "attention_sizes",
    "budgets_of",
    "by_layer",
    "chunk_work",
    "described",
    "described_kv",
    "described_windows",
    "forward_bytes",
    "forward_order",
    "has_room",
    "head_dims",
    "largest",
    "layer_lists",
    "layer_overrides",
    "layer_sets",
    "linear_bytes",
    "linear_share",
    "one_value",
    "pass_work",
    "plan_pass",
    "pool_of_numbers",
    "saved_of",
    "saved_operations",
    "spared_operations",
    "state_bytes",
    "strict_flops",
    "sum_bytes",
    "take_layers",
    "under_way_bytes",
    "why_no_sizes",
    "windows_of",
]
