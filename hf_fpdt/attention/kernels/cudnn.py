"""cuDNN's attention through PyTorch's operators; causal is top-left aligned.

It builds a plan for each shape, so it is asked for few (pairs of chunks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import NVIDIA_ALONE, Kernel, aten, why_not_half_on_gpu, why_not_kind
from .math import MATH
from .padding import with_one_width

WIDE_HEADS_FROM = 91_900  # the version of torch 2.11


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    if _is_one_pair(q, k):
        return MATH.forward(q, k, v, causal=causal, spec=spec)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=spec.scale)
    return out.transpose(1, 2), lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_one_pair(q, k):
        return MATH.backward(dout, q, k, v, out, lse, causal=causal, spec=spec)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = (q.shape[2], k.shape[2])
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.unsqueeze(-1),
        no_rng,
        no_rng,
        None,
        None,
        None,
        *lengths,
        0.0,
        causal,
        scale=spec.scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _is_one_pair(q: Tensor, k: Tensor) -> bool:
    """Whether one query sees one key, as in a document of one token; cuDNN refuses that."""
    return q.shape[1] == k.shape[1] == 1


def _cudnn_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    # torch.backends.cudnn is there on ROCm too, and means MIOpen.
    if device.type == "cuda" and torch.version.hip is None and not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic, and deterministic algorithms are asked for"
    reason = why_not_kind(spec, windows=False, softcaps=False)
    reason = reason or why_not_half_on_gpu(device, dtype, spec, least_sm=90, most_dim=256, on_rocm=NVIDIA_ALONE)
    if reason is None and max(spec.head_dim, spec.value_dim) > 128 and not _takes_wide_heads():
        return f"takes heads wider than 128 on Hopper alone, from cuDNN {WIDE_HEADS_FROM} on"
    return reason


def _takes_wide_heads() -> bool:
    """Where it was seen to be right; PyTorch's own choice of kernels waits for later versions."""
    version = torch.backends.cudnn.version() or 0
    return version >= WIDE_HEADS_FROM and torch.cuda.get_device_capability()[0] == 9


def _takes_two_widths(spec: AttentionSpec) -> bool:
    return (spec.head_dim, spec.value_dim) == (192, 128)


_forward, _backward = with_one_width(_cudnn_forward, _cudnn_backward, _takes_two_widths)
CUDNN = Kernel(
    name="cudnn",
    forward=_forward,
    backward=_backward,
    why_not=_cudnn_why_not,
    row_shape="pair",
)
