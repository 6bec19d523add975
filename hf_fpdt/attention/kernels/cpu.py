"""PyTorch's flash attention for CPUs; causal is top-left aligned, a window is a mask of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, aten, why_not_kind
from .padding import with_one_width


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = _band(q, k, spec.window) if causal and spec.window is not None else None
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=spec.scale
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    mask = _band(q, k, spec.window) if causal and spec.window is not None else None
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal and mask is None, attn_mask=mask, scale=spec.scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _band(q_BNSH: Tensor, k_BGTH: Tensor, window: int) -> Tensor:
    """0 where the query sees the key, else -inf, [S, T]; the last query is aligned with the last key."""
    mask = q_BNSH.new_full((q_BNSH.shape[2], k_BGTH.shape[2]), -math.inf)
    ahead = k_BGTH.shape[2] - q_BNSH.shape[2]
    return mask.triu_(ahead + 1) + mask.new_full(mask.shape, -math.inf).tril_(ahead - window)


def _cpu_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if (reason := why_not_kind(spec, windows=True, softcaps=False)) is not None:
        return reason
    served = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if dtype in served else f"takes {', '.join(map(str, served))}, not {dtype}"


_forward, _backward = with_one_width(_cpu_forward, _cpu_backward)
CPU = Kernel(
    name="cpu",
    forward=_forward,
    backward=_backward,
    why_not=_cpu_why_not,
    row_shape="rectangle",
    row_tokens=4096,
)
