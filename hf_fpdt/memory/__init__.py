"""Where tensors wait: GPU, pinned host memory, file; all streams.

In reading order:

    kv                 K and V of one layer and their gradients, wherever they lie (paper sections 4.1 and 4.2)
    streamed_kv        K, V, dK, dV of the chunks that the device does not hold: pinned host buffers, fetched one
    checkpoints        what backward needs of the forward pass, by (layer, chunk): kept, and fetched before it is
    entries            one kept tensor: on the device, in pinned host memory, or in a file; all three by the same
    files              tensors on their way to a file and back, through pinned buffers of the host
    transfers          streams and events: the only file that knows them; and how much memory there is. Everything
    pinned             pinned host memory: regions that stay pinned, and buffers that are cut out of them anew for
    disk               the last tier of the checkpoint store: bytes between CPU buffers and a file of this
    available          how much memory there is: of the GPU, of the host within its control groups, of a disk
    training           what gradients and optimizer will still take of the GPU once training has begun
    one_thread         one thread at a time in the layers of a model
"""

from .available import device_bytes_available
from .checkpoints import CheckpointStore, LayerCheckpoint
from .kv import KVStore
from .pinned import PinnedMemory
from .training import TrainingMemory, parameter_count
from .transfers import Mark, Transfers

__all__ = [
    "CheckpointStore",
    "KVStore",
    "LayerCheckpoint",
    "Mark",
    "PinnedMemory",
    "TrainingMemory",
    "Transfers",
    "device_bytes_available",
    "parameter_count",
]
