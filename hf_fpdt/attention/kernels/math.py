"""Plain PyTorch, any device and dtype: the twin that the others are checked against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, why_not_kind


def _math_scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q as [B, S, G, R, H], k, and capped scores [B, G, R, S, T] without a mask, all in at least fp32; R = N / G."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BSGRH = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bsgrh,btgh->bgrst", q_BSGRH, k.to(dtype)) * spec.scale
    if spec.softcap is not None:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    return q_BSGRH, k.to(dtype), scores


def _hidden_pairs(scores: Tensor, window: int | None) -> Tensor:
    """Where a query does not see a key, [S, T]; the last query is aligned with the last key."""
    s, t = scores.shape[-2:]
    every = torch.ones(s, t, dtype=torch.bool, device=scores.device)
    later = every.triu(t - s + 1)
    return later if window is None else later | every.tril(t - s - window)


def _math_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        _, _, scores = _math_scores(q, k, spec)
        if causal:
            scores.masked_fill_(_hidden_pairs(scores, spec.window), -math.inf)
        lse_BGRS = scores.logsumexp(-1)
        out = torch.einsum("bgrst,btgh->bsgrh", scores.softmax(-1), v.to(scores.dtype))
    return out.flatten(2, 3).to(q.dtype), lse_BGRS.flatten(1, 2)


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        q_BSGRH, k_, scores = _math_scores(q, k, spec)
        groups = (k.shape[2], -1)
        slope = None if spec.softcap is None else 1 - (scores / spec.softcap).square_()
        p = scores.sub_(lse.unflatten(1, groups).unsqueeze(-1)).exp_()
        if causal:
            p.masked_fill_(_hidden_pairs(p, spec.window), 0)
        do = dout.to(p.dtype).unflatten(2, groups)
        delta_BGRS = (do * out.to(p.dtype).unflatten(2, groups)).sum(-1).permute(0, 2, 3, 1)
        dv = torch.einsum("bgrst,bsgrh->btgh", p, do)
        dp = torch.einsum("bsgrh,btgh->bgrst", do, v.to(p.dtype))
        ds = dp.sub_(delta_BGRS.unsqueeze(-1)).mul_(p).mul_(spec.scale)
        ds = ds if slope is None else ds.mul_(slope)
        dq = torch.einsum("bgrst,btgh->bsgrh", ds, k_).flatten(2, 3)
        dk = torch.einsum("bgrst,bsgrh->btgh", ds, q_BSGRH)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _math_why_not(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> str | None:
    return why_not_kind(spec, windows=True, softcaps=True)


MATH = Kernel(
    name="math",
    forward=_math_forward,
    backward=_math_backward,
    why_not=_math_why_not,
    row_shape="pair",
    row_tokens=1024,
)
