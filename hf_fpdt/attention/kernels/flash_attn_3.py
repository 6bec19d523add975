"""The flash-attn package, version 3; causal is bottom-right aligned."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import NVIDIA_ALONE, Kernel, deterministic_argument, import_or_none, why_not_half_on_gpu


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, softmax_scale=spec.scale, causal=causal)
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
        **deterministic_argument(),
    )
    return grads.dq, grads.dk, grads.dv


def _fa3_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=90, most_dim=256, on_rocm=NVIDIA_ALONE)
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        return "is built for Hopper GPUs alone"
    if reason is None and import_or_none("flash_attn_interface") is None:
        return "the package flash-attn 3 (flash_attn_interface) is not installed"
    return reason


FLASH_ATTN_3 = Kernel(
    name="flash-attn-3",
    forward=_fa3_forward,
    backward=_fa3_backward,
    why_not=_fa3_why_not,
    row_shape="prefix",
)
