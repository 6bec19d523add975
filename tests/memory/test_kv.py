"""K, V and their gradients by chunk: whatever part of them streams, rows read and sums are those of plain tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_fpdt.attention.kernels.contract import Kernel
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.attention.rows import row_calls
from hf_fpdt.layout.chunks import Chunk, ChunkPlan
from hf_fpdt.layout.documents import Documents
from hf_fpdt.layout.spans import RowShape, Span, row_spans
from hf_fpdt.memory import kv as kv_store
from hf_fpdt.memory.kv import KVStore
from hf_fpdt.memory.streamed_kv import HostMemory, StreamedKV
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import TierAllocator
from tests.helpers.packed import PACKED, PACKINGS, random_lengths
from tests.helpers.stores import TINY, tiers, transfers
from tests.helpers.support import assert_rejects

PLANS = [ChunkPlan(20, 8), ChunkPlan(16, 8), ChunkPlan(7, 8), ChunkPlan(41, 8)]
SHAPES: tuple[RowShape, ...] = ("prefix", "rectangle", "pair")
Pair = tuple[Tensor, Tensor]


def cases() -> Iterator[tuple[ChunkPlan, int, RowShape]]:
    """Every number of resident chunks, every way of a kernel to read a row."""
    for plan, shape in itertools.product(PLANS, SHAPES):
        for resident in range(len(plan.chunks) + 1):
            yield plan, resident, shape


def whole(plan: ChunkPlan, dtype: torch.dtype = torch.float32) -> Pair:
    """K and V, neither contiguous, as a layer may make them."""
    k, v = (torch.randn(2, 2, plan.n_tokens, 8).to(dtype).transpose(1, 2) for _ in range(2))
    return k, v


def host_memory(allocator: TierAllocator[Tensor] | None = None) -> HostMemory:
    return HostMemory(transfers(), tiers() if allocator is None else allocator)


def put(store: KVStore, chunk: Chunk, kv: Pair) -> None:
    k, v = (part[:, chunk.start : chunk.stop].clone() for part in kv)
    store.put(chunk, k, v)
    if chunk.stop <= store.resident_tokens:
        k.fill_(7), v.fill_(7)  # these were copied


def spans_of(store: KVStore, chunk: Chunk, shape: RowShape) -> tuple[Span, ...]:
    unit, resident = store.plan.chunk_tokens, store.resident_tokens
    return row_spans(chunk.start, chunk.stop, shape=shape, unit_tokens=unit, max_tokens=24, resident_tokens=resident)


def assert_row(store: KVStore, chunk: Chunk, shape: RowShape, kv: Pair) -> None:
    read = torch.zeros(chunk.stop)
    for span, k, v in store.stream(spans_of(store, chunk, shape)):
        assert torch.equal(k, kv[0][:, span.start : span.stop]) and torch.equal(v, kv[1][:, span.start : span.stop])
        read[span.start : span.stop] += 1
    assert (read == 1).all()


def assert_forward(streamed: type[StreamedKV] = StreamedKV) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_store, "StreamedKV", streamed)
        for plan, resident, shape in cases():
            kv = whole(plan)
            with KVStore(plan, resident, host_memory()) as store:
                assert store.resident_tokens == min(8 * resident, plan.n_tokens)
                for chunk in plan.chunks:
                    assert not store.holds(chunk)
                    put(store, chunk, kv)
                    assert store.holds(chunk) and store.kv_shape == (2, 2, 8)
                    assert_row(store, chunk, shape, kv)
                for chunk in plan.chunks[:-1]:
                    assert_row(store, chunk, shape, kv)  # again, and not in the order of the pass


class Stale(StreamedKV):
    """Hands out the chunk that is there already."""

    def get(self, index: int, *, with_grads: bool) -> Pair:
        found = super().get(index, with_grads=with_grads)
        diagonal = self._here[max(self._here)].kv
        return diagonal if diagonal[0].shape == found[0].shape else found


class Swapped(StreamedKV):
    def put(self, index: int, kv: Pair, *, is_read_later: bool) -> None:
        super().put(index, (kv[1], kv[0]), is_read_later=is_read_later)


class NotCopied(StreamedKV):
    """Copies to the host nothing."""

    def put(self, index: int, kv: Pair, *, is_read_later: bool) -> None:
        super().put(index, kv, is_read_later=is_read_later)
        if index in self._kv:
            self._kv[index].write((torch.zeros_like(kv[0]), torch.zeros_like(kv[1])))


def test_rows_read_the_same_wherever_chunks_lie() -> None:
    assert_forward()
    assert_rejects(assert_forward, {"stale": Stale, "swapped": Swapped, "never copied": NotCopied})


def run_backward(store: KVStore, kv: Pair, shape: RowShape, *, rerun: bool) -> Iterator[tuple[Chunk, Pair, Pair]]:
    """Rows in descending order, as a layer's backward pass: (chunk, its sums, those of plain tensors)."""
    plan, wide = store.plan, torch.promote_types(kv[0].dtype, torch.float32)
    truth = [torch.zeros(part.shape, dtype=wide) for part in kv]
    for chunk in plan.chunks[:-1]:
        put(store, chunk, kv)
    for chunk in reversed(plan.chunks):
        if chunk is plan.chunks[-1]:
            put(store, chunk, kv)
        if rerun:
            assert_row(store, chunk, shape, kv)
        for span, k, v in store.stream(spans_of(store, chunk, shape), with_grads=True):
            keys = slice(span.start, span.stop)
            assert torch.equal(k, kv[0][:, keys]) and torch.equal(v, kv[1][:, keys])
            grads = torch.randn(k.shape).to(k.dtype), torch.randn(v.shape).to(v.dtype)
            for total, grad in zip(truth, grads, strict=True):
                total[:, keys] += grad
            store.add_grad(span, *grads)
        tokens = slice(chunk.start, chunk.stop)
        yield chunk, store.take_grad(chunk), (truth[0][:, tokens], truth[1][:, tokens])


def assert_gradients(streamed: type[StreamedKV] = StreamedKV, dtype: torch.dtype = torch.float32) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_store, "StreamedKV", streamed)
        for (plan, resident, shape), rerun in itertools.product(cases(), (False, True)):
            kv = whole(plan, dtype)
            with KVStore(plan, resident, host_memory()) as store:
                for _, ours, truth in run_backward(store, kv, shape, rerun=rerun):
                    for our, true in zip(ours, truth, strict=True):
                        assert our.dtype == dtype and torch.equal(our, true.to(dtype))


class Forgets(StreamedKV):
    """Sums stay where they are let go of."""

    def add_grad(self, index: int, place: slice, grads: Pair, *, complete: bool, stays: bool) -> None:
        super().add_grad(index, place, grads, complete=complete, stays=True)


class Overwrites(StreamedKV):
    """The last row's gradients in place of the sums."""

    def add_grad(self, index: int, place: slice, grads: Pair, *, complete: bool, stays: bool) -> None:
        self._here[index].grads = None
        super().add_grad(index, place, grads, complete=complete, stays=stays)


class FetchesNoSums(StreamedKV):
    """K and V come without what was added so far."""

    def begin(self, index: int, *, with_grads: bool) -> None:
        super().begin(index, with_grads=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_gradients_are_those_of_plain_tensors_bit_for_bit(dtype: torch.dtype) -> None:
    assert_gradients(dtype=dtype)
    assert_rejects(
        lambda streamed: assert_gradients(streamed, dtype),
        {"not written": Forgets, "overwritten": Overwrites, "not fetched": FetchesNoSums, "stale K, V": Stale},
    )


def test_host_bytes_are_those_predicted_and_all_go_back() -> None:
    for plan, resident, shape in cases():
        step = StepSizes(TINY, plan, batch=2, element_bytes=4, attention_bytes=4)
        kv_bytes = step.kv_bytes(0)
        kv = whole(plan)
        for backward in (False, True):
            allocator = tiers()
            with KVStore(plan, resident, host_memory(allocator)) as store:
                if backward:
                    assert len(list(run_backward(store, kv, shape, rerun=True))) == len(plan.chunks)
                else:
                    for chunk in plan.chunks:
                        put(store, chunk, kv)
                        assert_row(store, chunk, shape, kv)
                last = len(plan.chunks) - 1
                parts = sum(kv_bytes.parts[resident:last])
                grads = sum(kv_bytes.grads[resident : max(0, last - 1)]) if backward else 0
                assert allocator.used["host"] == 2 * (parts + grads), (plan, resident, backward)
            assert allocator.used["host"] == allocator.pool.used_bytes == 0
            if backward and resident == 0:
                assert allocator.peak["host"] == kv_bytes.host_bytes


# Packed rows -----------------------------------------------------------------------------------------


def packed_calls(store: KVStore, kernel: Kernel, chunk: Chunk, documents: Documents) -> list[tuple[Span, ...]]:
    """In the order of the engine: what reads earlier chunks at the end."""
    row = (chunk.start, chunk.stop)
    parts = row_calls(kernel, row, store.plan.chunk_tokens, store, documents=documents)
    return [spans for _, spans in reversed(parts)]


def run_packed(store: KVStore, kernel: Kernel, documents: Documents, kv: Pair) -> Iterator[tuple[Pair, Pair]]:
    """A layer's forward and backward pass over a packed row: (a chunk's sums, those of plain tensors)."""
    plan = store.plan
    for chunk in plan.chunks:
        assert {each.index for each in store.missing(chunk)} == set()
        put(store, chunk, kv)
        for spans in packed_calls(store, kernel, chunk, documents):
            for span, k, v in store.stream(spans):
                assert torch.equal(k, kv[0][:, span.start : span.stop])
                assert torch.equal(v, kv[1][:, span.start : span.stop])
    store.__exit__(None, None, None)
    store._held.clear()
    truth = [torch.zeros(part.shape) for part in kv]
    for chunk in reversed(plan.chunks):
        first = documents.start_of(chunk.start)
        for each in store.missing(chunk):
            assert each.stop > first, "no key of it is seen"
            put(store, each, kv)
        if not store.holds(chunk):
            put(store, chunk, kv)
        for spans in packed_calls(store, kernel, chunk, documents):
            for span, k, v in store.stream(spans, with_grads=True):
                keys = slice(span.start, span.stop)
                assert torch.equal(k, kv[0][:, keys]) and torch.equal(v, kv[1][:, keys])
                grads = torch.randn(k.shape), torch.randn(v.shape)
                for total, grad in zip(truth, grads, strict=True):
                    total[:, keys] += grad
                store.add_grad(span, *grads)
        tokens = slice(chunk.start, chunk.stop)
        yield store.take_grad(chunk), (truth[0][:, tokens], truth[1][:, tokens])


def assert_packed(streamed: type[StreamedKV] = StreamedKV) -> None:
    plan = ChunkPlan(40, 8)
    kv = tuple(part[:1] for part in whole(plan))
    packings = [*PACKINGS, *(random_lengths(seed, 40) for seed in range(6))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_store, "StreamedKV", streamed)
        for lengths, resident, kernel in itertools.product(packings, (0, 2, 5), (KERNELS["cpu"], PACKED)):
            documents, allocator = Documents.of_lengths(lengths), tiers()
            with KVStore(plan, resident, host_memory(allocator), documents) as store:
                for ours, truth in run_packed(store, kernel, documents, (kv[0], kv[1])):
                    assert torch.equal(ours[0], truth[0]) and torch.equal(ours[1], truth[1])
            if all(documents.ends_at(chunk.stop) for chunk in plan.chunks):
                assert allocator.peak["host"] == 0, "nobody reads it again"


class LetsGoOfSums(StreamedKV):
    """A chunk that comes between two rows pushes the sums out that the upper one left."""

    def put(self, index: int, kv: Pair, *, is_read_later: bool) -> None:
        self._here = {}
        super().put(index, kv, is_read_later=is_read_later)


class CopiesEverything(StreamedKV):
    def put(self, index: int, kv: Pair, *, is_read_later: bool) -> None:
        super().put(index, kv, is_read_later=True)


def test_packed_rows_bring_and_keep_what_their_documents_need() -> None:
    assert_packed()
    broken = {"sums let go": LetsGoOfSums, "overwritten": Overwrites, "in vain": CopiesEverything, "stale": Stale}
    assert_rejects(assert_packed, broken)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_buffers_go_back_when_an_exception_ends_the_block(rows: int) -> None:
    plan, allocator = PLANS[3], tiers()
    kv = whole(plan)
    with pytest.raises(ZeroDivisionError), KVStore(plan, 1, host_memory(allocator)) as store:
        steps = run_backward(store, kv, "rectangle", rerun=False)
        for _ in range(rows):
            next(steps)
        if not rows:
            put(store, plan.chunks[2], kv)
        # In the midst of a row, one fetch under way.
        next(iter(store.stream(spans_of(store, plan.chunks[0], "pair")))) if rows else None
        assert (allocator.used["host"] > 0) and 1 / 0
    assert allocator.used["host"] == allocator.pool.used_bytes == 0


@pytest.mark.parametrize("resident", [0, 1, 2, 3])
def test_calls_out_of_order_are_refused(resident: int) -> None:
    plan = ChunkPlan(24, 8)
    kv, first, second = whole(plan), plan.chunks[0], plan.chunks[1]
    with KVStore(plan, resident, host_memory()) as store:
        with pytest.raises(RuntimeError, match="nothing was put"):
            _ = store.kv_shape
        for there in ((), (second,)):
            for chunk in there:
                put(store, chunk, kv)
            with pytest.raises(RuntimeError, match=r"keys \[\d+, \d+\) were not put yet"):
                list(store.stream(spans_of(store, second, "pair")))
        put(store, first, kv)
        with pytest.raises(RuntimeError, match="chunk 0 has no gradient"):
            store.take_grad(first)
        for span, k, v in store.stream(spans_of(store, first, "pair"), with_grads=True):
            store.add_grad(span, k, v)
        store.take_grad(first)
        with pytest.raises(RuntimeError, match="or it was taken before"):
            store.take_grad(first)


def test_no_host_memory_is_said_with_the_numbers() -> None:
    allocator = tiers(host=4096)
    with (
        pytest.raises(RuntimeError, match="no host memory is left for K and V.*host_budget_gib"),
        KVStore(PLANS[0], 0, host_memory(allocator)) as store,
    ):
        put(store, PLANS[0].chunks[0], whole(PLANS[0]))
    assert allocator.pool.nbytes <= 4096


def test_tensors_that_are_whole_already_are_not_copied() -> None:
    k, v = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4)
    store = KVStore.holding(k, v)
    ((span, seen_k, seen_v),) = store.stream((Span(0, 9, True),), with_grads=True)
    assert (seen_k.data_ptr(), seen_v.data_ptr()) == (k.data_ptr(), v.data_ptr())
    store.add_grad(span, k, v)
    taken = store.take_grad(store.plan.chunks[0])
    assert [grad.data_ptr() for grad in taken] == [k.data_ptr(), v.data_ptr()], "one row's gradients are the sums"
