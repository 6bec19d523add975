"""K and V of one layer and their gradients, wherever they lie (paper sections 4.1 and 4.2).

The first chunks, which most rows read, are RESIDENT: side by side on the device, so that one kernel call reads them
all. The others are STREAMED from the host. Whoever uses a store asks by chunk or by span of keys and never learns
where the bytes were; that contract is the room's door.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from ..layout import Chunk, ChunkPlan, Documents, Span
from ..numerics import accumulation_dtype
from .streamed_kv import HostMemory, Pair, StreamedKV, zeros_for


class KVStore:
    """K and V of one layer by chunk, and their gradients, [B, T, G, H] with T the sequence's global tokens.

    A context manager: at its end the host buffers go back.

    Args:
        plan: how the sequence is cut.
        resident_chunks: chunks that stay on the device, from the first; None: all.
        host: where the others go; None: no chunk leaves the device.
        documents: of a packed row: what no later row reads goes nowhere.

    Raises:
        RuntimeError: a method is called out of order (read before put, a gradient taken twice, …).
    """

    def __init__(
        self,
        plan: ChunkPlan,
        resident_chunks: int | None = None,
        host: HostMemory | None = None,
        documents: Documents | None = None,
    ) -> None:
        self.plan, self._documents = plan, documents
        count = len(plan.chunks)
        self._resident_chunks = count if resident_chunks is None or host is None else min(resident_chunks, count)
        self._streamed = None if host is None else StreamedKV(host)
        self._kv: Pair | None = None  # of the resident chunks, as are the sums of gradients
        self._grads: Pair | None = None
        self._held: set[int] = set()
        self._shape: tuple[int, int, int] | None = None
        self._dtype: torch.dtype | None = None
        self._row_end = 0

    @classmethod
    def holding(cls, k_BTGH: Tensor, v_BTGH: Tensor) -> KVStore:
        """A store of one chunk around tensors that are already whole; nothing is copied."""
        store = cls(ChunkPlan(k_BTGH.shape[1], k_BTGH.shape[1]))
        store._kv, store._held = (k_BTGH, v_BTGH), {0}
        store._note(k_BTGH, v_BTGH)
        return store

    @property
    def resident_tokens(self) -> int:
        """Keys [0, resident_tokens) lie side by side on the device."""
        return min(self._resident_chunks * self.plan.chunk_tokens, self.plan.n_tokens)

    def put(self, chunk: Chunk, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        """Keep K and V of one chunk: copied, but a streamed chunk is read as it is until its row is done."""
        self._note(k_BSGH, v_BSGH)
        if chunk.index >= self._resident_chunks:
            self._streaming().put(chunk.index, (k_BSGH, v_BSGH), is_read_later=self._is_read_later(chunk))
        else:
            if self._kv is None:
                self._kv = (self._whole(k_BSGH), self._whole(v_BSGH))
            for whole, part in zip(self._kv, (k_BSGH, v_BSGH), strict=True):
                whole[:, chunk.start : chunk.stop].copy_(part)
        self._held.add(chunk.index)

    def _is_read_later(self, chunk: Chunk) -> bool:
        """Whether another row than the chunk's own reads it: its last document goes on in the next chunk."""
        documents = self._documents
        return chunk.stop < self.plan.n_tokens and (documents is None or not documents.ends_at(chunk.stop))

    def _note(self, k: Tensor, v: Tensor) -> None:
        self._shape, self._dtype = (k.shape[0], k.shape[2], max(k.shape[3], v.shape[3])), k.dtype

    def _streaming(self) -> StreamedKV:
        assert self._streamed is not None
        return self._streamed

    def _whole(self, part_BSGH: Tensor) -> Tensor:
        batch, _, *heads = part_BSGH.shape
        return part_BSGH.new_empty(batch, self.resident_tokens, *heads)

    def stream(self, spans: Sequence[Span], *, with_grads: bool = False) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """(span, K, V) on the device for each span of one row, in order; the tensors are not to be written.

        Args:
            with_grads: whether `add_grad` follows for each.
        """
        for span in spans:
            if not self._covers(span):
                raise RuntimeError(f"KVStore.stream: keys [{span.start}, {span.stop}) were not put yet.")
        self._row_end = spans[-1].stop
        diagonal = self._streamed_index(spans[0])
        if diagonal is not None:
            self._streaming().start_row(diagonal)
        for span, after in zip(spans, (*spans[1:], None), strict=True):
            index = self._streamed_index(span)
            if index is not None:
                place = self._place(span, index)
                k, v = (part[:, place] for part in self._streaming().get(index, with_grads=with_grads))
            else:
                assert self._kv is not None
                k, v = (whole[:, span.start : span.stop] for whole in self._kv)
            # Before the kernel that reads this span, so that the next one arrives meanwhile.
            coming = None if after is None else self._streamed_index(after)
            if coming is not None:
                self._streaming().begin(coming, with_grads=with_grads)
            yield span, k, v

    def _streamed_index(self, span: Span) -> int | None:
        """The streamed chunk that the span is; None for resident keys."""
        return None if span.stop <= self.resident_tokens else span.start // self.plan.chunk_tokens

    def _place(self, span: Span, index: int) -> slice:
        """The span's keys among those of the streamed chunk."""
        first = index * self.plan.chunk_tokens
        return slice(span.start - first, span.stop - first)

    def holds(self, chunk: Chunk) -> bool:
        """Whether K and V of the chunk were put."""
        return chunk.index in self._held

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Batch, heads and the larger head dimension of K and V."""
        if self._shape is None:
            raise RuntimeError("KVStore.kv_shape: nothing was put yet.")
        return self._shape

    def missing(self, chunk: Chunk) -> tuple[Chunk, ...]:
        """The chunks, ascending, that the row of `chunk` reads beside its own, and that were not put."""
        return tuple(each for each in self.plan.read_by(chunk, None, self._documents)[:-1] if not self.holds(each))

    def _covers(self, span: Span) -> bool:
        size = self.plan.chunk_tokens
        return self._held.issuperset(range(span.start // size, -(-span.stop // size)))

    def add_grad(self, span: Span, dk_BSGH: Tensor, dv_BSGH: Tensor) -> None:
        """Add one call's gradients to those of its keys; the sums are fp32 (float64 for float64)."""
        index = self._streamed_index(span)
        if index is not None:
            stays = span.stop == self._row_end  # the next row's diagonal
            place = self._place(span, index)
            self._streaming().add_grad(index, place, (dk_BSGH, dv_BSGH), complete=span.causal, stays=stays)
            return
        whole_call = span.start == 0 and span.stop == self.plan.n_tokens
        if self._grads is None and whole_call:
            # The first row sees every key: its gradients ARE the sums so far. A plan of one row needs no cast at all.
            one_row = len(self.plan.chunks) == 1
            self._grads = (dk_BSGH, dv_BSGH) if one_row else (_in_sums_dtype(dk_BSGH), _in_sums_dtype(dv_BSGH))
            return
        if self._grads is None:
            assert self._kv is not None
            self._grads = (zeros_for(self._kv[0]), zeros_for(self._kv[1]))
        for total, part in zip(self._grads, (dk_BSGH, dv_BSGH), strict=True):
            total[:, span.start : span.stop].add_(part)

    def take_grad(self, chunk: Chunk) -> Pair:
        """dK, dV of a chunk in the dtype of K, once every row that reads it was added."""
        sums = self._sums(chunk) if chunk.index in self._held else None
        if sums is None or self._dtype is None:
            raise RuntimeError(f"KVStore.take_grad: chunk {chunk.index} has no gradient, or it was taken before.")
        self._held.remove(chunk.index)
        return sums[0].to(self._dtype), sums[1].to(self._dtype)

    def _sums(self, chunk: Chunk) -> Pair | None:
        if chunk.index >= self._resident_chunks:
            return self._streaming().take_grad(chunk.index)
        if self._grads is None:
            return None
        dk, dv = (total[:, chunk.start : chunk.stop] for total in self._grads)
        return dk, dv

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._streamed is not None:
            self._streamed.close()


def _in_sums_dtype(grad: Tensor) -> Tensor:
    """The gradient itself where it has that dtype already: nobody else holds what a kernel gave."""
    return grad.to(accumulation_dtype(grad.dtype))
