"""PyTorch's memory-efficient attention: slow, but it takes heads wider than 256; causal is top-left aligned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import NVIDIA_ALONE, Kernel, aten, why_not_half_on_gpu, why_not_kind

MOST_DIM = 512
_FULL, _CAUSAL_TOP_LEFT = 0, 1


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    kind = _CAUSAL_TOP_LEFT if causal else _FULL
    out, lse, *_ = aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, kind, True, scale=spec.scale
    )
    return out, lse[:, :, : q.shape[1]]  # it is padded to whole tiles


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k.shape[2]
    k, v = (x.repeat_interleave(q.shape[2] // groups, dim=2) for x in (k, v))
    tiles = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))
    no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
    kind = _CAUSAL_TOP_LEFT if causal else _FULL
    dq, dk, dv, _ = aten._efficient_attention_backward(
        *(dout.contiguous(), q, k, v, None, out, None, None, q.shape[1], k.shape[1], tiles, 0.0, no_rng, no_rng),
        *(kind, False),
        scale=spec.scale,
    )
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


def _efficient_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic, and deterministic algorithms are asked for"
    reason = why_not_kind(spec, windows=False, softcaps=False)
    return reason or why_not_half_on_gpu(device, dtype, spec, least_sm=80, most_dim=MOST_DIM, on_rocm=NVIDIA_ALONE)


EFFICIENT = Kernel(
    name="efficient",
    forward=_efficient_forward,
    backward=_efficient_backward,
    why_not=_efficient_why_not,
    row_shape="pair",
)
