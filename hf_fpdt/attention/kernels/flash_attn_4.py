"""flash-attn-4 (CuTe DSL), the fastest on Hopper; causal and windows are bottom-right aligned."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import (
    NVIDIA_ALONE,
    Cuts,
    Kernel,
    deterministic_argument,
    import_or_none,
    why_not_half_on_gpu,
    why_not_kind,
    window_arguments,
)
from .padding import with_one_width


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    out, lse, *_ = fa4._flash_attn_fwd(
        q,
        k,
        v,
        softmax_scale=spec.scale,
        causal=causal,
        return_lse=True,
        softcap=spec.softcap,
        **window_arguments(spec, causal),
    )
    return out, lse


def _fa4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    kind = {"softcap": spec.softcap or 0.0, **window_arguments(spec, causal), **deterministic_argument()}
    grads = fa4._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=spec.scale, causal=causal, **kind)
    dq, dk, dv = grads[:3]
    return dq, dk, dv


def _fa4_packed_forward(q: Tensor, k: Tensor, v: Tensor, *, cuts: Cuts, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    kind = {"softcap": spec.softcap, **window_arguments(spec, True), **cuts.arguments()}
    out, lse, *_ = fa4._flash_attn_fwd(
        q[0], k[0], v[0], softmax_scale=spec.scale, causal=True, return_lse=True, **kind
    )
    return out[None], lse[None]


def _fa4_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    kind = {"softcap": spec.softcap or 0.0, **window_arguments(spec, True), **deterministic_argument()}
    one = (x[0] for x in (q, k, v, out, dout, lse))
    grads = fa4._flash_attn_bwd(*one, softmax_scale=spec.scale, causal=True, **kind, **cuts.arguments())
    dq, dk, dv = (x[None] for x in grads[:3])
    return dq, dk, dv


def _fa4_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=90, most_dim=256, on_rocm=NVIDIA_ALONE)
    reason = reason or why_not_kind(spec, windows=True, softcaps=True)
    reason = reason or _blackwell_why_not(spec, torch.cuda.get_device_capability()[0])
    if reason is None and import_or_none("flash_attn.cute.interface") is None:
        return "the package flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    return reason


def _blackwell_why_not(spec: AttentionSpec, major: int) -> str | None:
    """By the tables of flash-attn-4 4.0.0b36: beyond 128 its backward pass there has two kernels of one width each."""
    widths = spec.head_dim, spec.value_dim
    if major >= 12 and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic on this GPU, and deterministic algorithms are asked for"
    if major < 10 or max(widths) <= 128:
        return None
    latent = widths == (192, 128) and not spec.grouped
    wide = widths == (256, 256) and spec.window is None and spec.softcap is None
    return None if major < 12 and (latent or wide) else f"does not train {spec} on this GPU"


# Two widths are its own where every query head has a key head.
def _takes_two_widths(spec: AttentionSpec) -> bool:
    return not spec.grouped


_forward, _backward = with_one_width(_fa4_forward, _fa4_backward, _takes_two_widths)
_packed_forward, _packed_backward = with_one_width(_fa4_packed_forward, _fa4_packed_backward, _takes_two_widths)
FLASH_ATTN_4 = Kernel(
    name="fa4",
    forward=_forward,
    backward=_backward,
    packed_forward=_packed_forward,
    packed_backward=_packed_backward,
    why_not=_fa4_why_not,
    row_shape="prefix",
)
