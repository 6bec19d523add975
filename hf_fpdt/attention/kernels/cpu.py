"""PyTorch's flash attention for CPUs; causal is top-left aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, aten, why_not_plain


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=spec.scale)
    return out.transpose(1, 2), lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=spec.scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _cpu_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if (reason := why_not_plain(spec)) is not None:
        return reason
    served = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if dtype in served else f"takes {', '.join(map(str, served))}, not {dtype}"


CPU = Kernel(
    name="cpu",
    forward=_cpu_forward,
    backward=_cpu_backward,
    why_not=_cpu_why_not,
    row_shape="rectangle",
    row_tokens=4096,
)
