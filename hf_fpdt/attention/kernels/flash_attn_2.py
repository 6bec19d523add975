"""The flash-attn package, version 2; causal is bottom-right aligned."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, import_or_none, why_not_half_on_gpu


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = fa2._flash_attn_forward(q, k, v, 0.0, spec.scale, causal, -1, -1, 0.0, None, False)
    return out, lse


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    fa2._flash_attn_backward(
        *(dout.contiguous(), q, k, v, out, lse, dq, dk, dv, 0.0, spec.scale, causal, -1, -1, 0.0, None),
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _fa2_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    reason = why_not_half_on_gpu(device, dtype, spec, least_sm=80, most_dim=256, on_rocm=None)
    if reason is not None:
        return reason
    interface = import_or_none("flash_attn.flash_attn_interface")
    if interface is None:
        return "the package flash-attn (2.7 or later) is not installed"
    version = getattr(import_or_none("flash_attn"), "__version__", "0.0").split(".")
    return None if (int(version[0]), int(version[1])) >= (2, 7) else "the package flash-attn is older than 2.7"


FLASH_ATTN_2 = Kernel(
    name="flash-attn-2",
    forward=_fa2_forward,
    backward=_fa2_backward,
    why_not=_fa2_why_not,
    row_shape="prefix",
)
