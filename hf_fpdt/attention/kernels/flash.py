"""FlashAttention-2 as PyTorch has it; causal and windows are bottom-right aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, aten, why_not_half_on_gpu, why_not_kind, window_arguments
from .padding import with_one_width


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    lengths = (q.shape[1], k.shape[1])
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, *lengths, 0.0, causal, False, scale=spec.scale, **window_arguments(spec, causal)
    )
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (q.shape[1], k.shape[1])
    no_rng = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        *lengths,
        0.0,
        causal,
        *no_rng,
        scale=spec.scale,
        **window_arguments(spec, causal),
    )
    return dq, dk, dv


def _flash_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    # PyTorch runs AOTriton there: a row would read the keys of an earlier one, and nothing would say so.
    on_rocm = "aligns the causal mask with the first key on AMD GPUs, not with the last; install flash-attn"
    reason = why_not_kind(spec, windows=True, softcaps=False)
    return reason or why_not_half_on_gpu(device, dtype, spec, least_sm=80, most_dim=256, on_rocm=on_rocm)


_forward, _backward = with_one_width(_flash_forward, _flash_backward)
FLASH = Kernel(
    name="flash",
    forward=_forward,
    backward=_backward,
    why_not=_flash_why_not,
    row_shape="prefix",
)
