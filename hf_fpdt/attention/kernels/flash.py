"""FlashAttention-2 as PyTorch has it; causal and windows are bottom-right aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Cuts, Kernel, aten, why_not_half_on_gpu, why_not_kind, window_arguments
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


def _flash_packed_forward(
    q: Tensor, k: Tensor, v: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        *(q[0], k[0], v[0], *_documents(cuts), 0.0, True, False), scale=spec.scale, **window_arguments(spec, True)
    )
    return out[None], lse[None]


def _flash_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    no_rng = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    one = (x[0] for x in (dout, q, k, v, out, lse))
    grads = aten._flash_attention_backward(
        *(*one, *_documents(cuts), 0.0, True, *no_rng), scale=spec.scale, **window_arguments(spec, True)
    )
    dq, dk, dv = (x[None] for x in grads)
    return dq, dk, dv


def _documents(cuts: Cuts) -> tuple[Tensor, Tensor, int, int]:
    return cuts.queries, cuts.keys, cuts.most_queries, cuts.most_keys


def _flash_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    # PyTorch runs AOTriton there: a row would read the keys of an earlier one, and nothing would say so.
    on_rocm = "aligns the causal mask with the first key on AMD GPUs, not with the last; install flash-attn"
    reason = why_not_kind(spec, windows=True, softcaps=False)
    return reason or why_not_half_on_gpu(device, dtype, spec, least_sm=80, most_dim=256, on_rocm=on_rocm)


_forward, _backward = with_one_width(_flash_forward, _flash_backward)
_packed_forward, _packed_backward = with_one_width(_flash_packed_forward, _flash_packed_backward)
FLASH = Kernel(
    name="flash",
    forward=_forward,
    backward=_backward,
    packed_forward=_packed_forward,
    packed_backward=_packed_backward,
    why_not=_flash_why_not,
    row_shape="prefix",
)
