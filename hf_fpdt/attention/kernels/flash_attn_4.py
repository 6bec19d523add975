"""flash-attn-4 (CuTe DSL), the fastest on Hopper; causal is bottom-right aligned."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import NVIDIA_ALONE, Kernel, deterministic_argument, import_or_none, why_not_half_on_gpu


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    out, lse, *_ = fa4._flash_attn_fwd(q, k, v, softmax_scale=spec.scale, causal=causal, return_lse=True)
    return out, lse


def _fa4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    grads = fa4._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=spec.scale, causal=causal, **deterministic_argument()
    )
    dq, dk, dv = grads[:3]
    return dq, dk, dv


def _fa4_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=90, most_dim=128, on_rocm=NVIDIA_ALONE)
    if reason is None and import_or_none("flash_attn.cute.interface") is None:
        return "the package flash-attn-4 is not installed (pip install flash-attn-4)"
    return reason


FLASH_ATTN_4 = Kernel(
    name="fa4", forward=_fa4_forward, backward=_fa4_backward, why_not=_fa4_why_not, row_shape="prefix"
)
