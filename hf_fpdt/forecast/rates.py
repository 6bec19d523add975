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


# Of heads: of keys and values alike, or of each.
Width = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Rates of one kind of GPU in bfloat16.

    Attributes:
        name: as people say it.
        memory_gib: what a process can use of its memory, beside CUDA's context and the code of kernels.
        peak: floating-point operations a second by the data sheet, dense; what MFU is measured against.
        matmul: of large matrix products.
        attention: forward and backward of the attention kernel, by the width of its heads; two where values have
            another width than keys. What is missing is reckoned from heads of 128, see `attention_rates`.
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
    attention: Mapping[Width, tuple[float, float]]
    memory: float
    link: float
    peers: float
    network: float
    source: str

    def attention_rates(self, head_dim: int, value_dim: int) -> tuple[float, float]:
        """Forward and backward for heads of these widths: those of the next wider heads that there are rates of."""
        known: Width = next((width for width in WIDTHS if head_dim <= width), WIDTHS[-1])
        if head_dim != value_dim:
            known = LATENT
        return self.attention[known] if known in self.attention else _scaled(self.attention[128], known)


# Of H100 80GB: heads of 128 and 64 from whole steps and their kernels, see docs/offload.md. Those of 256, and of 192
# with values of 128, from one call each with flash-attn-4 4.0.0b36: 32K queries, causal, the last of 128K keys.
WIDTHS = (64, 128, 256)
LATENT = (192, 128)
_H100_ATTENTION: Mapping[Width, tuple[float, float]] = MappingProxyType(
    {128: (650e12, 594e12), 64: (539e12, 546e12), 256: (759e12, 317e12), LATENT: (704e12, 510e12)}
)


def _scaled(at_128: tuple[float, float], width: Width) -> tuple[float, float]:
    """What a GPU would do if heads of that width were to it, beside heads of 128, what they are to an H100."""
    pairs = zip(at_128, _H100_ATTENTION[width], _H100_ATTENTION[128], strict=True)
    forward, backward = (own * other / known for own, other, known in pairs)
    return forward, backward


_H100 = GPU(
    name="H100 80GB",
    memory_gib=80 - UNUSABLE_GIB,  # 78.4 were left in a training step, and a little differs from run to run
    peak=989e12,
    matmul=670e12,
    attention=_H100_ATTENTION,
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
