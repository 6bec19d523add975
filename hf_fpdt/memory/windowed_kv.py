"""K and V of a layer whose queries see a window of keys: a ring of the chunks that one row reads, on the device.

Nothing of the sequence is kept. A forward pass puts chunks in ascending order and lets go of those that no later row
reads; a backward pass goes down, and asks for the chunks that a row reads beside those of the row before it. A row's
keys are handed over side by side, so that one kernel call reads them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from ..layout import Chunk, ChunkPlan, Documents, Span
from .streamed_kv import Pair, accumulator, zeros_for


class WindowedKV:
    """K and V by chunk, and the sums of their gradients, [B, T, G, H]; what `KVStore` is to a layer without a window.

    Args:
        plan: how the sequence is cut.
        window: keys that a query sees, its own among them; or blocks of so many.
        documents: of a packed row, no query of which sees another's keys.

    Raises:
        RuntimeError: a row reads keys that were not put, or a gradient is taken twice.
    """

    resident_tokens = 2**62  # whatever keys a row asks for, it gets side by side

    def __init__(self, plan: ChunkPlan, window: int, documents: Documents | None = None) -> None:
        self.plan, self.window, self._documents = plan, window, documents
        self._kv: dict[int, Pair] = {}
        self._grads: dict[int, Pair] = {}

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Batch, heads and the larger head dimension of K and V."""
        k, v = next(iter(self._kv.values()))
        return k.shape[0], k.shape[2], max(k.shape[3], v.shape[3])

    def missing(self, chunk: Chunk) -> tuple[Chunk, ...]:
        """The chunks, ascending, that the row of `chunk` reads beside its own, and that are not here.

        A backward pass asks on its way down: later chunks, which no row reads any more, are let go of.
        """
        self._kv = {index: pair for index, pair in self._kv.items() if index <= chunk.index}
        return tuple(each for each in self._read_by(chunk)[:-1] if each.index not in self._kv)

    def put(self, chunk: Chunk, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        """Keep K and V of one chunk, and of the earlier ones those alone that its row reads."""
        first = self._read_by(chunk)[0].index
        self._kv = {index: pair for index, pair in self._kv.items() if index >= first}
        self._kv[chunk.index] = (k_BSGH.contiguous(), v_BSGH.contiguous())

    def _read_by(self, chunk: Chunk) -> tuple[Chunk, ...]:
        return self.plan.read_by(chunk, self.window, self._documents)

    def holds(self, chunk: Chunk) -> bool:
        """Whether K and V of the chunk are here."""
        return chunk.index in self._kv

    def stream(self, spans: Sequence[Span], *, with_grads: bool = False) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """(span, K, V) for each span of a row, its keys side by side on the device; they are not to be written.

        Args:
            with_grads: whether `add_grad` follows; nothing is fetched for it.
        """
        for span in spans:
            indices = range(span.start // self.plan.chunk_tokens, -(-span.stop // self.plan.chunk_tokens))
            if not all(index in self._kv for index in indices):
                raise RuntimeError(f"WindowedKV.stream: keys [{span.start}, {span.stop}) were not put yet.")
            k, v = (self._together([self._kv[index][part] for index in indices], span) for part in (0, 1))
            yield span, k, v

    def _together(self, parts: list[Tensor], span: Span) -> Tensor:
        """The keys of the span out of whole chunks."""
        begin = span.start % self.plan.chunk_tokens
        length = span.stop - span.start
        if len(parts) == 1:
            return parts[0][:, begin : begin + length]
        end = length + begin - self.plan.chunk_tokens * (len(parts) - 1)
        return torch.cat([parts[0][:, begin:], *parts[1:-1], parts[-1][:, :end]], dim=1)

    def add_grad(self, span: Span, dk_BSGH: Tensor, dv_BSGH: Tensor) -> None:
        """Add a call's gradients to those of its keys; the sums are fp32 (float64 for float64)."""
        size = self.plan.chunk_tokens
        for chunk in self.plan.chunks[span.start // size : -(-span.stop // size)]:
            first, last = max(span.start, chunk.start), min(span.stop, chunk.stop)
            keys, place = slice(first - span.start, last - span.start), slice(first - chunk.start, last - chunk.start)
            self._add(chunk, place, (dk_BSGH[:, keys], dv_BSGH[:, keys]))

    def _add(self, chunk: Chunk, place: slice, grads: Pair) -> None:
        sums = self._grads.get(chunk.index)
        if sums is None and place == slice(0, chunk.stop - chunk.start):
            self._grads[chunk.index] = accumulator(grads[0]), accumulator(grads[1])
            return
        if sums is None:
            sums = self._grads[chunk.index] = zeros_for(self._kv[chunk.index][0]), zeros_for(self._kv[chunk.index][1])
        for total, part in zip(sums, grads, strict=True):
            total[:, place].add_(part)

    def take_grad(self, chunk: Chunk) -> Pair:
        """dK, dV of a chunk in the dtype of K, once every row that reads it was added; it is not here any more."""
        if chunk.index not in self._grads:
            raise RuntimeError(f"WindowedKV.take_grad: chunk {chunk.index} has no gradient, or it was taken before.")
        dk, dv = self._grads.pop(chunk.index)
        k, v = self._kv.pop(chunk.index)
        return dk.to(k.dtype), dv.to(v.dtype)

    def __enter__(self) -> WindowedKV:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kv, self._grads = {}, {}
