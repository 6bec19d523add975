"""Slow and obvious twins of the fast paths, in the dtype they are given. For tests and checks only."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BSNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    sinks_N: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax(q·kᵀ·scale)·v, the last query aligned with the last key, differentiable by autograd.

    Args:
        sinks_N: the score of each head's key without a value.
        window: keys that a query sees, its own among them.
        softcap: bound of the scores, softcap · tanh(score / softcap).

    Returns:
        out [B, S, N, H of V] and lse [B, N, S], in the dtype of q.
    """
    group = q_BSNH.shape[2] // k_BTGH.shape[2]
    k = k_BTGH.repeat_interleave(group, dim=2)
    v = v_BTGH.repeat_interleave(group, dim=2)
    scores_BNST = torch.einsum("bsnh,btnh->bnst", q_BSNH, k) * scale
    s, t = scores_BNST.shape[-2:]
    hidden = torch.ones(s, t, dtype=torch.bool, device=q_BSNH.device).triu(t - s + 1)
    if softcap is not None:
        scores_BNST = softcap * torch.tanh(scores_BNST / softcap)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(t - s - window)
    scores_BNST = scores_BNST.masked_fill(hidden, float("-inf"))
    if sinks_N is not None:
        column = sinks_N.view(1, -1, 1, 1).expand(*scores_BNST.shape[:3], 1)
        scores_BNST = torch.cat([scores_BNST, column], dim=-1)
    out_BSNH = torch.einsum("bnst,btnh->bsnh", scores_BNST.softmax(-1)[..., :t], v)
    return out_BSNH, scores_BNST.logsumexp(-1)


def peaked_qkv(
    batch: int,
    q_len: int,
    kv_len: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, N, H], k and v [B, T, G, H] whose softmax (scale H^-0.5) mostly has one key above one half.

    Flat attention averages errors away. A peak far from the query's own chunk shows a wrong merge at once.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(length: int, heads: int, scale: float) -> Tensor:
        shape = (batch, length, heads, head_dim)
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    # Scores then have a standard deviation near 12, and the gap to the second largest is a few units.
    return normal(q_len, q_heads, 12.0), normal(kv_len, kv_heads, 1.0), normal(kv_len, kv_heads, 1.0)
