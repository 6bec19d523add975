"""Online attention: one query row against a stream of K, V spans.

The row's calls are merged by log-add-exp with the maximum subtracted, in fp32 (paper section 4.1); a row that is one
kernel call is not merged and keeps the kernel's own precision and speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..layout import Span
from ..numerics import accumulation_dtype
from .kernels.contract import Cuts, Kernel
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
        part = call_forward(kernel, q_BSNH, k, v, span, spec)
        merged = part if merged is None else merge(merged, part)
    assert merged is not None
    if sinks_N is not None:
        merged = with_sinks(merged, sinks_N)
    return merged[0].to(q_BSNH.dtype), merged[1].to(accumulation_dtype(q_BSNH.dtype))


def call_forward(
    kernel: Kernel, q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, span: Span, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries over the keys of one span, which may be those of several documents."""
    if not span.cuts:
        return kernel.forward(q_BSNH, k_BTGH, v_BTGH, causal=span.causal, spec=spec)
    assert kernel.packed_forward is not None
    return kernel.packed_forward(q_BSNH, k_BTGH, v_BTGH, cuts=_cuts(span, q_BSNH.shape[1], q_BSNH.device), spec=spec)


def call_backward(
    kernel: Kernel, dout_BSNH: Tensor, q_BSNH: Tensor, *kv_and_row: Tensor, span: Span, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the same call.

    Args:
        kv_and_row: k, v of the span; out, lse of the whole row.
    """
    if not span.cuts:
        return kernel.backward(dout_BSNH, q_BSNH, *kv_and_row, causal=span.causal, spec=spec)
    assert kernel.packed_backward is not None
    cuts = _cuts(span, q_BSNH.shape[1], q_BSNH.device)
    return kernel.packed_backward(dout_BSNH, q_BSNH, *kv_and_row, cuts=cuts, spec=spec)


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
        part, dk, dv = call_backward(kernel, dout_BSNH, q_BSNH, k, v, *row, span=span, spec=spec)
        store.add_grad(span, dk, dv)
        dq = part if dq is None else dq.to(accumulation_dtype(dq.dtype)).add_(part)
    assert dq is not None
    return dq.to(q_BSNH.dtype)


@lru_cache(maxsize=256)
def _cuts(span: Span, queries: int, device: torch.device) -> Cuts:
    """Every layer of a step asks for the same; the host waits for the copy once."""
    return Cuts.of(span.cuts, (span.stop - queries, span.stop), (span.start, span.stop), device)
