"""The flash-attn package, version 3; causal and windows are bottom-right aligned."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    kind = _kind(fa3._flash_attn_forward, spec, causal)
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, softmax_scale=spec.scale, causal=causal, **kind)
    return out, lse


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    grads = SimpleNamespace(dq=torch.empty_like(q), dk=torch.empty_like(k), dv=torch.empty_like(v))
    fa3._flash_attn_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        **vars(grads),
        softmax_scale=spec.scale,
        is_causal=causal,
        **_kind(fa3._flash_attn_backward, spec, causal),
        **deterministic_argument(),
    )
    return grads.dq, grads.dk, grads.dv


def _fa3_packed_forward(q: Tensor, k: Tensor, v: Tensor, *, cuts: Cuts, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    kind = {**_kind(fa3._flash_attn_forward, spec, True), **cuts.arguments()}
    out, lse, *_ = fa3._flash_attn_forward(q[0], k[0], v[0], softmax_scale=spec.scale, causal=True, **kind)
    return out[None], lse[None]


def _fa3_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    kind = {**_kind(fa3._flash_attn_backward, spec, True), **cuts.arguments(), **deterministic_argument()}
    one = (x[0].contiguous() for x in (dout, q, k, v, out, lse))
    grads = {"dq": dq[0], "dk": dk[0], "dv": dv[0]}
    fa3._flash_attn_backward(*one, **grads, softmax_scale=spec.scale, is_causal=True, **kind)
    return dq, dk, dv


def _kind(function: Callable[..., Any], spec: AttentionSpec, causal: bool) -> dict[str, Any]:
    """Window and softcap; the package has had two ways of writing windows."""
    kind: dict[str, Any] = {} if spec.softcap is None else {"softcap": spec.softcap}
    if spec.window is None or not causal:
        return kind
    if "window_size" in inspect.signature(function).parameters:
        return kind | {"window_size": (spec.window - 1, 0)}
    return kind | window_arguments(spec, causal)


def _fa3_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=90, most_dim=256, on_rocm=NVIDIA_ALONE)
    reason = reason or why_not_kind(spec, windows=True, softcaps=True)
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        return "is built for Hopper GPUs alone"
    if reason is None and max(spec.head_dim, spec.value_dim) > 192 and torch.are_deterministic_algorithms_enabled():
        return "its backward pass at head_dim 256 is not deterministic, and deterministic algorithms are asked for"
    if reason is None and import_or_none("flash_attn_interface") is None:
        return "the package flash-attn 3 (flash_attn_interface) is not installed"
    return reason


_forward, _backward = with_one_width(_fa3_forward, _fa3_backward)
_packed_forward, _packed_backward = with_one_width(_fa3_packed_forward, _fa3_packed_backward)
FLASH_ATTN_3 = Kernel(
    name="flash-attn-3",
    forward=_forward,
    backward=_backward,
    packed_forward=_packed_forward,
    packed_backward=_packed_backward,
    why_not=_fa3_why_not,
    row_shape="prefix",
)
