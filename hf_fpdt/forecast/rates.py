"""What known GPUs do in a second. Numbers only; no torch.

The H100's rates were measured, see docs/offload.md; what is derived from data sheets says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

# Of the data sheet of NVLink, what all-to-alls of 34 to 101 MB to one other GPU got between two H200 (240 to 300 GB/s
# where neither waited for the other).
NVLINK_SHARE = 0.6
# Of the memory a GPU is sold with, what its driver, CUDA's context and the code of kernels leave no process.
UNUSABLE_GIB = 1.8


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Rates of one kind of GPU in bfloat16.

    Attributes:
        name: as people say it.
        memory_gib: what a process can use of its memory, beside CUDA's context and the code of kernels.
        peak: floating-point operations a second by the data sheet, dense; what MFU is measured against.
        matmul: of large matrix products.
        attention: forward and backward of the attention kernel, by head dimension.
        memory: bytes a second of device memory.
        link: bytes a second from and to host memory, one way.
        peers: bytes a second to the other GPUs of its host, one way; NVLink's data sheet, less what is lost.
        network: bytes a second to GPUs of other hosts, one way; data sheet of one network card for each GPU.
        source: where the rates come from.
    """

    name: str
    memory_gib: float
    peak: float
    matmul: float
    attention: Mapping[int, tuple[float, float]]
    memory: float
    link: float
    peers: float
    network: float
    source: str


_H100 = GPU(
    name="H100 80GB",
    memory_gib=80 - UNUSABLE_GIB,  # 78.4 were left in a training step, and a little differs from run to run
    peak=989e12,
    matmul=670e12,
    attention=MappingProxyType({128: (650e12, 594e12), 64: (539e12, 546e12)}),
    memory=3.0e12,
    link=52e9,
    peers=NVLINK_SHARE * 450e9,
    network=50e9,
    source="rates measured on one H100 with flash-attn-4; between GPUs by data sheets",
)
_A100 = GPU(
    name="A100 80GB",
    memory_gib=80 - UNUSABLE_GIB,
    peak=312e12,
    matmul=250e12,
    attention=MappingProxyType({128: (220e12, 190e12), 64: (190e12, 170e12)}),
    memory=1.8e12,
    link=24e9,
    peers=NVLINK_SHARE * 300e9,
    network=25e9,
    source="derived from data sheets, not measured",
)
GPUS: Mapping[str, GPU] = MappingProxyType(
    {
        "h100": _H100,
        "h200": replace(_H100, name="H200 141GB", memory_gib=138.8, memory=4.3e12, source="the H100's, not measured"),
        "a100-80": _A100,
        "a100-40": replace(_A100, name="A100 40GB", memory_gib=40 - UNUSABLE_GIB, memory=1.4e12),
    }
)


def with_memory(gpu: GPU, sold_gib: float) -> GPU:
    """A GPU of that kind with other memory."""
    name = re.sub(r" [\d.]+ ?GB.*", "", gpu.name)
    return replace(gpu, name=f"{name} {sold_gib:g}GB", memory_gib=sold_gib - UNUSABLE_GIB)


def gpu_named(gpu_name: str) -> GPU | None:
    """The row of a GPU, None where its kind is not in the table.

    Args:
        gpu_name: as its driver says it, "NVIDIA H100 80GB HBM3".
    """
    return next((gpu for kind, gpu in GPUS.items() if kind.partition("-")[0].upper() in gpu_name), None)


def peak_of(gpu_name: str) -> float | None:
    """Operations a second that MFU of a GPU of this name is measured against; None for an unknown kind."""
    gpu = gpu_named(gpu_name)
    return None if gpu is None else gpu.peak
