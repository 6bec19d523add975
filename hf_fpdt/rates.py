"""What GPUs do in a second, and from that the seconds of a training step. Numbers only; no torch.

A step is attention at the kernel's rate, matrix products at theirs, and everything else (norms, activations, adapters,
copies inside the device) at the speed of device memory. The H100's rates were measured, see docs/offload.md; what is
derived from data sheets says so. What GPUs send each other comes on top, see `exchange`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from .keep import Kept
from .memory import ModelSizes, StepSizes

# The backward kernel of attention makes the scores again: five products where the forward one has two.
BACKWARD_OPERATIONS = 2.5
# Matrix products of a layer in a step, in forward passes of it: forward, replay, gradient of the inputs, K and V once
# more; training every weight adds the gradients of the weights. A replay leaves out the products that nobody reads.
ADAPTER_PASSES, FULL_PASSES = 3.14, 4.14
# Passes of one layer's forward over device memory outside of matrix products, in hidden and intermediate sizes a
# token, over Liger's kernels: with LoRA on every linear, and without adapters. The step makes so many times more.
GATED_TRAFFIC, PLAIN_TRAFFIC, FULL_TRAFFIC, STEP_TRAFFIC = (24, 11), (34, 7), (14, 8), 3.48
# A rebuilt input also makes its way to the store and back.
REBUILD_TRAFFIC = 2
# Of the data sheet of NVLink, what all-to-alls of 34 to 101 MB to one other GPU got between two H200 (240 to 300 GB/s
# where neither waited for the other).
NVLINK_SHARE = 0.6
# Of the memory a GPU is sold with, what its driver, CUDA's context and the code of kernels leave no process.
UNUSABLE_GIB = 1.8
# Of device memory, a logit: its value twice and its gradient; and where the head trains, for every weight of it and
# every chunk of the loss, a gradient added to a sum in fp32.
LOGIT_BYTES, HEAD_SUM_BYTES = 7, 12


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


def strict_flops(model: ModelSizes, vocabulary: int, n_tokens: int, *, full: bool) -> float:
    """Operations that a step on one sequence needs, none of them twice; causal attention at half.

    tokens · (4·N + 6·L·S·heads·head_dim) where adapters train, 6·N where every weight does. N are the linear weights
    of the base model and of its head: no adapters, no embeddings.
    """
    weights = model.layers * model.linear_weights + vocabulary * model.hidden
    attention = 6 * model.layers * n_tokens * model.q_heads * model.head_dim
    return n_tokens * ((6 if full else 4) * weights + attention)


def step_seconds(step: StepSizes, kept: Kept, gpu: GPU, *, full: bool) -> float:
    """Seconds that every rank of the group computes in one step, copies to and from the host all under it."""
    m, ranks = step.model, step.plan.sp_size
    tokens = step.batch * step.plan.n_tokens / ranks
    forward_rate, backward_rate = gpu.attention[128 if m.head_dim > 64 else 64]
    attention = 2 * step.plan.n_tokens * tokens * m.q_heads * m.head_dim
    linear = 2 * tokens * m.layer_parameters / gpu.matmul
    hidden, intermediate = FULL_TRAFFIC if full else GATED_TRAFFIC if m.gated else PLAIN_TRAFFIC
    rest = tokens * (hidden * m.hidden + intermediate * m.intermediate) * step.element_bytes / gpu.memory
    passes = (FULL_PASSES if full else ADAPTER_PASSES) - _unread_share(m)
    layer = attention / forward_rate + BACKWARD_OPERATIONS * attention / backward_rate
    layer += passes * linear + STEP_TRAFFIC * rest
    again = kept.attention_reruns * attention / forward_rate + kept.rebuilt * (linear + REBUILD_TRAFFIC * rest)
    return m.layers * layer + again + _head_seconds(step, tokens, gpu, full=full)


def _unread_share(m: ModelSizes) -> float:
    """Of a layer's weights, those of the products that a replay leaves out (see `linear`), for Llama and GPT-NeoX."""
    unread = m.hidden * m.intermediate + (0 if m.gated else m.hidden**2)
    return unread / max(unread, m.layer_parameters)


def _head_seconds(step: StepSizes, tokens: float, gpu: GPU, *, full: bool) -> float:
    products = (3 if full else 2) * 2 * tokens * step.vocabulary * step.model.hidden / gpu.matmul
    sums = HEAD_SUM_BYTES * step.model.hidden / max(1, step.loss_tokens) if full else 0
    return products + (LOGIT_BYTES + sums) * tokens * step.vocabulary / gpu.memory
