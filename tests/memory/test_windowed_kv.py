"""K, V and their gradients in a ring of chunks: rows read and sums are those of plain tensors, and little is held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_fpdt.layout.chunks import Chunk, ChunkPlan
from hf_fpdt.layout.spans import Span, first_key
from hf_fpdt.memory import windowed_kv
from hf_fpdt.memory.windowed_kv import WindowedKV
from tests.helpers.support import assert_rejects

PLANS = [ChunkPlan(20, 8), ChunkPlan(16, 8), ChunkPlan(7, 8), ChunkPlan(41, 8), ChunkPlan(6, 1)]
WINDOWS = (1, 2, 7, 8, 9, 10, 16, 17, 18, 33, 40, 41, 64)
Pair = tuple[Tensor, Tensor]
Ring = type[WindowedKV]


def cases() -> Iterator[tuple[ChunkPlan, int]]:
    for plan in PLANS:
        for window in WINDOWS:
            yield plan, window


def whole(plan: ChunkPlan, dtype: torch.dtype = torch.float32) -> Pair:
    """K and V of two widths, neither contiguous, as a layer may make them."""
    k, v = (torch.randn(2, 2, plan.n_tokens, width).to(dtype).transpose(1, 2) for width in (8, 6))
    return k, v


def put(ring: WindowedKV, chunk: Chunk, kv: Pair) -> None:
    k, v = (part[:, chunk.start : chunk.stop].clone() for part in kv)
    ring.put(chunk, k, v)


def span_of(ring: WindowedKV, chunk: Chunk) -> Span:
    return Span(first_key(chunk.start, ring.window), chunk.stop, True)


def held(ring: WindowedKV) -> set[int]:
    return {chunk.index for chunk in ring.plan.chunks if ring.holds(chunk)}


def read_by(ring: WindowedKV, chunk: Chunk) -> set[int]:
    """By the window itself, key by key."""
    size = ring.plan.chunk_tokens
    return {key // size for key in range(max(0, chunk.start - ring.window + 1), chunk.stop)}


def assert_row(ring: WindowedKV, chunk: Chunk, kv: Pair, *, with_grads: bool = False) -> Span:
    ((span, k, v),) = ring.stream((span_of(ring, chunk),), with_grads=with_grads)
    keys = slice(span.start, span.stop)
    assert k.shape[1] == span.stop - span.start and span == span_of(ring, chunk)
    assert torch.equal(k, kv[0][:, keys]) and torch.equal(v, kv[1][:, keys])
    return span


def assert_forward(kind: Ring = WindowedKV) -> None:
    for plan, window in cases():
        kv = whole(plan)
        with kind(plan, window) as ring:
            for chunk in plan.chunks:
                assert not ring.holds(chunk)
                put(ring, chunk, kv)
                assert ring.missing(chunk) == () and ring.kv_shape == (2, 2, 8)
                assert held(ring) == read_by(ring, chunk), "more is held than the row reads, or less"
                assert_row(ring, chunk, kv)
                assert_row(ring, chunk, kv)  # again


class Stale(WindowedKV):
    """Hands out the row's own chunk in place of an earlier one."""

    def _together(self, parts: list[Tensor], span: Span) -> Tensor:
        same = parts[0].shape == parts[-1].shape
        return super()._together([parts[-1], *parts[1:]] if same else parts, span)


class OffByOne(WindowedKV):
    """Keys from one before the first that counts."""

    def _together(self, parts: list[Tensor], span: Span) -> Tensor:
        before = max(0, span.start - 1) if span.start % self.plan.chunk_tokens else span.start
        return super()._together(parts, Span(before, span.stop - (span.start - before), True))


class Swapped(WindowedKV):
    def put(self, chunk: Chunk, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        super().put(chunk, v_BSGH, k_BSGH)


class Hoards(WindowedKV):
    """Lets go of nothing."""

    def put(self, chunk: Chunk, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        kept = self._kv
        super().put(chunk, k_BSGH, v_BSGH)
        self._kv = kept | self._kv


def test_rows_read_their_window_and_no_other_chunk_is_held() -> None:
    assert_forward()
    broken = {"stale": Stale, "off by one": OffByOne, "swapped": Swapped, "nothing let go": Hoards}
    assert_rejects(assert_forward, broken)


def run_backward(ring: WindowedKV, kv: Pair) -> Iterator[tuple[Pair, Pair]]:
    """Rows in descending order, as a layer's backward pass: (a chunk's sums, those of plain tensors)."""
    plan, wide = ring.plan, torch.promote_types(kv[0].dtype, torch.float32)
    truth = [torch.zeros(part.shape, dtype=wide) for part in kv]
    asked: list[int] = []
    for chunk in reversed(plan.chunks):
        missing = ring.missing(chunk)
        assert [each.index for each in missing] == sorted(each.index for each in missing)
        assert {each.index for each in missing} == read_by(ring, chunk) - {chunk.index} - held(ring)
        asked += [each.index for each in missing]
        for each in missing:
            put(ring, each, kv)
        if not ring.holds(chunk):
            asked.append(chunk.index)
            put(ring, chunk, kv)
        assert held(ring) == read_by(ring, chunk), "more is held than the row reads, or less"
        span = assert_row(ring, chunk, kv, with_grads=True)
        keys = slice(span.start, span.stop)
        grads = [torch.randn(part[:, keys].shape).to(part.dtype) for part in kv]
        for total, grad in zip(truth, grads, strict=True):
            total[:, keys] += grad
        ring.add_grad(span, grads[0], grads[1])
        tokens = slice(chunk.start, chunk.stop)
        yield ring.take_grad(chunk), (truth[0][:, tokens], truth[1][:, tokens])
        assert not ring.holds(chunk)
    assert sorted(asked) == [chunk.index for chunk in plan.chunks], "K and V of a chunk are made once"


def assert_backward(kind: Ring = WindowedKV, dtype: torch.dtype = torch.float32) -> None:
    for plan, window in cases():
        kv = whole(plan, dtype)
        with kind(plan, window) as ring:
            for ours, truth in run_backward(ring, kv):
                for our, true in zip(ours, truth, strict=True):
                    assert our.dtype == dtype and torch.equal(our, true.to(dtype)), (plan, window)


class Overwrites(WindowedKV):
    """The last row's gradients in place of the sums."""

    def _add(self, chunk: Chunk, place: slice, grads: Pair) -> None:
        self._grads.pop(chunk.index, None)
        super()._add(chunk, place, grads)


class Misplaces(WindowedKV):
    """Gradients of a part of a chunk at its beginning."""

    def _add(self, chunk: Chunk, place: slice, grads: Pair) -> None:
        whole_chunk = (chunk.stop - chunk.start) - grads[0].shape[1]
        for part in grads if whole_chunk else ():
            part.copy_(part.roll(1, 1))
        super()._add(chunk, place, grads)


class OwnAlone(WindowedKV):
    """A row's gradients for the chunks before its own are lost."""

    def _add(self, chunk: Chunk, place: slice, grads: Pair) -> None:
        last = max(self._kv)
        zeros = (torch.zeros_like(grads[0]), torch.zeros_like(grads[1]))
        super()._add(chunk, place, grads if chunk.index == last else zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_of_gradients_are_those_of_plain_tensors_bit_for_bit(dtype: torch.dtype) -> None:
    assert_backward(dtype=dtype)
    broken = {"overwritten": Overwrites, "misplaced": Misplaces, "own alone": OwnAlone, "stale K, V": Stale}
    assert_rejects(lambda kind: assert_backward(kind, dtype), broken)


def test_rows_without_gradients_leave_nothing_behind() -> None:
    """Where attention's weights are frozen no gradient is taken: going down lets go of what no row reads."""
    for plan, window in cases():
        kv = whole(plan)
        with WindowedKV(plan, window) as ring:
            for chunk in reversed(plan.chunks):
                for each in (*ring.missing(chunk), *(() if ring.holds(chunk) else (chunk,))):
                    put(ring, each, kv)
                assert_row(ring, chunk, kv)
                assert held(ring) == read_by(ring, chunk)


def test_sums_are_wider_than_half_precision() -> None:
    """Of many small terms in bfloat16 the later ones would be lost."""
    plan = ChunkPlan(64, 1)
    k = torch.zeros(1, 64, 1, 1, dtype=torch.bfloat16)
    with WindowedKV(plan, 64) as ring:
        for chunk in plan.chunks:
            put(ring, chunk, (k, k))
        for chunk in reversed(plan.chunks):
            grad = torch.full((1, chunk.stop, 1, 1), 1.0 if chunk.index == 63 else 2.0**-9, dtype=torch.bfloat16)
            ring.add_grad(span_of(ring, chunk), grad, grad)
        dk, _ = ring.take_grad(plan.chunks[0])
    assert float(dk) == float(torch.tensor(1 + 63 * 2.0**-9).bfloat16())


def test_calls_out_of_order_are_refused() -> None:
    plan = ChunkPlan(24, 8)
    kv, (first, second, third) = whole(plan), plan.chunks
    with WindowedKV(plan, 9) as ring:
        put(ring, second, kv)
        with pytest.raises(RuntimeError, match=r"keys \[0, 16\) were not put yet"):
            list(ring.stream((Span(0, 16, True),)))
        with pytest.raises(RuntimeError, match="chunk 1 has no gradient"):
            ring.take_grad(second)
        put(ring, third, kv)
        ring.add_grad(span_of(ring, third), *(part[:, 8:24].clone() for part in kv))
        ring.take_grad(third)
        with pytest.raises(RuntimeError, match="or it was taken before"):
            ring.take_grad(third)
    assert held(ring) == set()
    assert first not in ring.missing(first)


def test_nothing_is_copied_where_a_row_reads_its_own_chunk_alone() -> None:
    plan = ChunkPlan(16, 8)
    kv = whole(plan)
    with WindowedKV(plan, 1) as ring:
        own = tuple(part[:, 8:16].contiguous() for part in kv)
        ring.put(plan.chunks[1], *own)
        ((_, k, v),) = ring.stream((Span(8, 16, True),))
        assert (k.data_ptr(), v.data_ptr()) == (own[0].data_ptr(), own[1].data_ptr())
    assert windowed_kv.WindowedKV.resident_tokens == 2**62
