"""Where tensors wait: GPU, pinned host memory, file; all streams.

In reading order:

    kv            K and V of one layer, and their gradients
    streamed_kv   those of chunks that wait on the host
    windowed_kv   the same of a layer with a window: a ring of chunks
    checkpoints   what backward needs of the forward pass, by layer and chunk
    device_tiers  what a pass may keep where: measured, planned, pinned
    entries       one kept tensor, on whichever tier
    files         tensors on their way to a file and back
    transfers     streams, events, copies
    pinned        pinned host memory, cut into buffers
    disk          one nameless file, read and written directly
    available     how much memory there is, and what gradients and optimizer will take
    one_thread    one thread at a time in a model
"""

from .available import TrainingMemory, device_bytes_available, host_bytes_available, parameter_count
from .checkpoints import CheckpointStore, LayerCheckpoint, ModelPass
from .kv import KVStore
from .pinned import PinnedMemory
from .transfers import Mark, Transfers
from .windowed_kv import WindowedKV

__all__ = [
    "CheckpointStore",
    "KVStore",
    "LayerCheckpoint",
    "Mark",
    "ModelPass",
    "PinnedMemory",
    "TrainingMemory",
    "Transfers",
    "WindowedKV",
    "device_bytes_available",
    "host_bytes_available",
    "parameter_count",
]
