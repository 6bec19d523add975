"""The flash-attn package, version 2; causal and windows are bottom-right aligned."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Cuts, Kernel, import_or_none, why_not_half_on_gpu, why_not_kind
from .padding import with_one_width


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = fa2._flash_attn_forward(q, k, v, 0.0, spec.scale, causal, *_kind(spec, causal), None, False)
    return out, lse


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    fa2._flash_attn_backward(
        *(dout.contiguous(), q, k, v, out, lse, dq, dk, dv, 0.0, spec.scale, causal, *_kind(spec, causal), None),
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _fa2_packed_forward(q: Tensor, k: Tensor, v: Tensor, *, cuts: Cuts, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    kind = {**_named_kind(spec), **cuts.arguments()}
    out, lse, *_ = fa2._flash_attn_varlen_forward(
        q[0], k[0], v[0], dropout_p=0.0, softmax_scale=spec.scale, causal=True, **kind
    )
    return out[None], lse[None]


def _fa2_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    fa2._flash_attn_varlen_backward(
        *(x[0].contiguous() for x in (dout, q, k, v, out, lse)),
        *(dq[0], dk[0], dv[0]),
        dropout_p=0.0,
        softmax_scale=spec.scale,
        causal=True,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_named_kind(spec),
        **cuts.arguments(),
    )
    return dq, dk, dv


def _named_kind(spec: AttentionSpec) -> dict[str, Any]:
    return dict(zip(("window_size_left", "window_size_right", "softcap"), _kind(spec, True), strict=True))


def _kind(spec: AttentionSpec, causal: bool) -> tuple[int, int, float]:
    """Keys to the left and to the right of a query's own that it sees, -1 for all; softcap, 0 for none."""
    window = (-1, -1) if spec.window is None or not causal else (spec.window - 1, 0)
    return *window, spec.softcap or 0.0


def _fa2_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=80, most_dim=256, on_rocm=None)
    reason = reason or why_not_kind(spec, windows=True, softcaps=True)
    if reason is not None:
        return reason
    interface = import_or_none("flash_attn.flash_attn_interface")
    if interface is None:
        return "the package flash-attn (2.7 or later) is not installed"
    version = getattr(import_or_none("flash_attn"), "__version__", "0.0").split(".")
    return None if (int(version[0]), int(version[1])) >= (2, 7) else "the package flash-attn is older than 2.7"


_forward, _backward = with_one_width(_fa2_forward, _fa2_backward)
_packed_forward, _packed_backward = with_one_width(_fa2_packed_forward, _fa2_packed_backward)
FLASH_ATTN_2 = Kernel(
    name="flash-attn-2",
    forward=_forward,
    backward=_backward,
    packed_forward=_packed_forward,
    packed_backward=_packed_backward,
    why_not=_fa2_why_not,
    row_shape="prefix",
)
