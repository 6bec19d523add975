"""Packed rows: lengths of documents, a kernel with packed calls that runs anywhere, and documents one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hf_fpdt.attention.kernels.contract import Cuts
from hf_fpdt.attention.kernels.math import MATH
from hf_fpdt.attention.spec import AttentionSpec
from hf_fpdt.layout.documents import Documents

# With chunks of 8: one document; of length 1; ending on borders of chunks; longer than several; all of it together.
PACKINGS: tuple[tuple[int, ...], ...] = (
    (40,),
    (1, 39),
    (39, 1),
    (1,) * 40,
    (8, 16, 8, 8),
    (3, 25, 4, 8),
    (7, 2, 1, 1, 21, 3, 5),
    (20, 20),
)


def random_lengths(seed: int, n_tokens: int) -> tuple[int, ...]:
    """Lengths of documents, many of them short, that fill a row."""
    generator, lengths = torch.Generator().manual_seed(seed), []
    while n_tokens:
        most = min(n_tokens, int(torch.randint(1, 5, (), generator=generator)) ** 3)
        lengths.append(int(torch.randint(1, most + 1, (), generator=generator)))
        n_tokens -= lengths[-1]
    return tuple(lengths)


def positions(documents: Documents) -> Tensor:
    """That restart with each document, [1, T]."""
    return torch.cat([torch.arange(length) for length in documents.lengths])[None]


def moved(documents: Documents, by: int = 1) -> Documents:
    """Every boundary in the row off by one; those that fall out of it are lost."""
    starts = sorted({start + by for start in documents.starts[1:]} | {0})
    return Documents(tuple(start for start in starts if 0 <= start < documents.n_tokens), documents.n_tokens)


def _parts(cuts: Cuts) -> Iterator[tuple[slice, slice]]:
    queries, keys = cuts.queries.tolist(), cuts.keys.tolist()
    for q, q_end, k, k_end in zip(queries, queries[1:], keys, keys[1:], strict=False):
        assert 0 < q_end - q <= min(k_end - k, cuts.most_queries) and k_end - k <= cuts.most_keys
        yield slice(q, q_end), slice(k, k_end)


def _forward(q: Tensor, k: Tensor, v: Tensor, *, cuts: Cuts, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    assert len(q) == 1, "packed calls are of one row"
    parts = [MATH.forward(q[:, a], k[:, b], v[:, b], causal=True, spec=spec) for a, b in _parts(cuts)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, cuts: Cuts, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for a, b in _parts(cuts):
        row = out[:, a], lse[:, :, a]
        part = MATH.backward(dout[:, a], q[:, a], k[:, b], v[:, b], *row, causal=True, spec=spec)
        for whole, tokens, grad in zip(grads, (a, b, b), part, strict=True):
            whole[:, tokens] = grad
    return grads[0], grads[1], grads[2]


# What flash-attention's packed calls are defined to give.
PACKED = replace(MATH, row_shape="prefix", packed_forward=_forward, packed_backward=_backward)
