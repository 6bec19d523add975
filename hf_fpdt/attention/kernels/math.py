"""Plain PyTorch, any device and dtype: the twin that the others are checked against."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .contract import Kernel, why_not_kind

# One call's scores exist for so many pairs at a time, however long it is.
MOST_SCORES = 2**26
# In backward scores, their gradients and the slope of a softcap exist at once, in fp32, and where a query sees no key.
SCORE_BYTES = MOST_SCORES * (3 * 4 + 2)


def _query_slices(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Queries whose scores fit, and the keys that they see; the last query is aligned with the last key."""
    (b, s, n, _), t = q.shape, k.shape[1]
    count = max(1, MOST_SCORES // (b * n * t))
    for start in range(0, s, count):
        stop = min(start + count, s)
        yield slice(start, stop), slice(0, t - s + stop if causal else t)


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
    slices = _query_slices(q, k, causal)
    parts = [_few_forward(q[:, at], k[:, seen], v[:, seen], causal=causal, spec=spec) for at, seen in slices]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)


def _few_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
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
    dtype = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    dq = []
    for at, seen in _query_slices(q, k, causal):
        few = dout[:, at], q[:, at], k[:, seen], v[:, seen], out[:, at], lse[:, :, at]
        dq_part, dk_part, dv_part = _few_backward(*few, causal=causal, spec=spec)
        dq.append(dq_part)
        dk[:, seen] += dk_part
        dv[:, seen] += dv_part
    return torch.cat(dq, dim=1).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _few_backward(
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
    return dq, dk, dv


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
