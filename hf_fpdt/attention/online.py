"""Online attention: one query row against a stream of K, V spans.

The row's calls are merged by log-add-exp with the maximum subtracted, in fp32 (paper section 4.1); a row that is one
kernel call is not merged and keeps the kernel's own precision and speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..layout import Block, Span, first_key, row_spans
from ..numerics import accumulation_dtype
from .kernels.contract import MAX_ELEMENTS, Kernel
from .sinks import with_sinks
from .spec import AttentionSpec

Stream = Iterable[tuple[Span, Tensor, Tensor]]


class KVSource(Protocol):
    """K and V of a sequence, wherever they lie, by spans of keys; `KVStore` is one."""

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Batch, heads and the larger head dimension of K and V."""

    @property
    def resident_tokens(self) -> int:
        """Keys [0, resident_tokens) lie side by side on the device."""

    def stream(self, spans: Sequence[Span], *, with_grads: bool = False) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """(span, K, V) on the device for each span of one row, in order."""

    def add_grad(self, span: Span, dk_BSGH: Tensor, dv_BSGH: Tensor) -> None:
        """Add one call's gradients to those of its keys."""


def forward_row(
    kernel: Kernel, q_BSNH: Tensor, kv: Stream, *, spec: AttentionSpec, sinks_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query row over the spans of `kv`.

    Args:
        sinks_N: a score of each head to a key without a value, see `sinks`.

    Returns:
        out [B, S, N, H of V] in the dtype of q, and the row's lse [B, N, S].
    """
    merged: tuple[Tensor, Tensor] | None = None
    for span, k, v in kv:
        part = kernel.forward(q_BSNH, k, v, causal=span.causal, spec=spec)
        merged = part if merged is None else merge(merged, part)
    assert merged is not None
    if sinks_N is not None:
        merged = with_sinks(merged, sinks_N)
    return merged[0].to(q_BSNH.dtype), merged[1].to(accumulation_dtype(q_BSNH.dtype))


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of a and of b: each out weighs exp(its lse - the lse of both). a's out is consumed.

    out is fp32 or wider; lse is float64: backward recovers probabilities as exp(score - lse), and an fp32 lse that was
    rounded at every merge costs fp32 attention several times its own error.
    """
    (out_a, lse_a), (out_b, lse_b) = a, (b[0], b[1].double())
    lse = torch.logaddexp(lse_a.double(), lse_b)
    dtype = accumulation_dtype(out_a.dtype)
    weight_a, weight_b = ((x - lse).exp_().to(dtype).transpose(1, 2).unsqueeze(-1) for x in (lse_a, lse_b))
    # In place and without a wide copy of b: memory traffic is all that a merge costs.
    return out_a.to(dtype).mul_(weight_a).addcmul_(out_b, weight_b), lse


def backward_row(
    kernel: Kernel,
    dout_BSNH: Tensor,
    q_BSNH: Tensor,
    row: tuple[Tensor, Tensor],
    store: KVSource,
    spans: Sequence[Span],
    *,
    spec: AttentionSpec,
) -> Tensor:
    """dq of one query row, whose merged (out, lse) is `row`; dK and dV of the spans it reads are added in `store`."""
    dq: Tensor | None = None
    for span, k, v in store.stream(spans, with_grads=True):
        part, dk, dv = kernel.backward(dout_BSNH, q_BSNH, k, v, *row, causal=span.causal, spec=spec)
        store.add_grad(span, dk, dv)
        dq = part if dq is None else dq.to(accumulation_dtype(dq.dtype)).add_(part)
    assert dq is not None
    return dq.to(q_BSNH.dtype)


def kernel_spans(
    kernel: Kernel,
    diagonal: tuple[int, int],
    unit_tokens: int,
    store: KVSource,
    *,
    window: int | None = None,
    most_tokens: int = MAX_ELEMENTS,
) -> tuple[Span, ...]:
    """The calls for the row with that diagonal over the keys of `store`, none over the kernels' 32-bit limit.

    Args:
        diagonal: key positions of the row's first query and one past its last; of one row of `layout.query_rows`.
        unit_tokens: keys a call, where the kernel wants pairs, and of streamed keys.
        window: keys a query sees; then one call has all that the row's queries see, and no other.
        most_tokens: keys a call takes at most, without a window.

    Raises:
        NotImplementedError: a window is too long for one call.
    """
    indexed = MAX_ELEMENTS // math.prod(store.kv_shape)
    if isinstance(window, Block):
        # As if the sequence began with the block; its keys lie side by side.
        first = first_key(diagonal[0], window)
        row = diagonal[0] - first, diagonal[1] - first
        spans = row_spans(*row, shape=kernel.row_shape, unit_tokens=unit_tokens, max_tokens=min(indexed, most_tokens))
        return tuple(Span(span.start + first, span.stop + first, span.causal) for span in spans)
    if window is not None:
        span = Span(first_key(diagonal[0], window), diagonal[1], True)
        if span.stop - span.start > indexed:
            raise NotImplementedError(
                f"hf_fpdt: a window of {window:,} keys and a chunk of {diagonal[1] - diagonal[0]:,} are more than the "
                f"{indexed:,} keys that kernels index in one call; use shorter chunks (chunk_tokens)."
            )
        return (span,)
    limit = min(indexed, most_tokens)
    resident = store.resident_tokens
    return row_spans(
        *diagonal, shape=kernel.row_shape, unit_tokens=unit_tokens, max_tokens=limit, resident_tokens=resident
    )
