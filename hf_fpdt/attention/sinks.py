"""Attention sinks on top of any kernel: each head has a score to a key that has no value.

Once a row is merged, the sink is one more term of its softmax: lse' = log(exp(lse) + exp(sink)), and the output
shrinks by exp(lse - lse'). With (out', lse') a kernel's backward pass gives dq, dk and dv as they are, since
probabilities are exp(score - lse') and add up to one with the sink's. What is left is the gradient of the sink itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulation_dtype

SLICE_TOKENS = 4096  # products in fp32 of so many tokens at a time


def with_sinks(row: tuple[Tensor, Tensor], sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, N, H], lse [B, N, S]) of a merged row with the sinks in its softmax; the row's out is consumed."""
    out, lse = row[0], row[1].double()
    total = torch.logaddexp(lse, sinks_N.double()[:, None])
    shrunk = (lse - total).exp_().to(accumulation_dtype(out.dtype)).transpose(1, 2).unsqueeze(-1)
    return out.mul_(shrunk), total  # in place a product in fp32 is rounded once, and no wide copy is made


def sinks_gradient(dout_BSNH: Tensor, row: tuple[Tensor, Tensor], sinks_N: Tensor) -> Tensor:
    """The sinks' gradient from one row, whose (out, lse) have the sinks in them: [N], fp32 or wider."""
    out, lse = row
    dtype = accumulation_dtype(out.dtype)
    shares = (sinks_N.to(dtype)[:, None] - lse.to(dtype)).exp_()  # [B, N, S]
    total = torch.zeros_like(sinks_N, dtype=dtype)
    for start in range(0, out.shape[1], SLICE_TOKENS):
        tokens = slice(start, start + SLICE_TOKENS)
        products = (out[:, tokens].to(dtype) * dout_BSNH[:, tokens].to(dtype)).sum(-1)  # [B, S, N]
        total -= torch.einsum("bsn,bns->n", products, shares[:, :, tokens])
    return total
