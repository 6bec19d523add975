"""ChunkPlan and row_spans: every token has one owner and one place, every key is read exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from hf_fpdt.layout.chunks import Chunk, ChunkPlan
from hf_fpdt.layout.spans import Block, RowShape, Span, first_key, query_rows, row_spans, seen_pairs
from tests.helpers.support import assert_rejects

PLANS = [(1, 1, 1), (1, 8, 1), (8, 8, 1), (17, 8, 1), (63, 8, 1), (24, 8, 2), (22, 8, 2), (130, 64, 2), (36, 12, 4)]
SHAPES: tuple[RowShape, ...] = ("prefix", "rectangle", "pair")


@pytest.mark.parametrize(("n_tokens", "chunk_tokens", "sp_size"), PLANS)
def test_chunks_cover_the_sequence_in_order(n_tokens: int, chunk_tokens: int, sp_size: int) -> None:
    chunks = ChunkPlan(n_tokens, chunk_tokens, sp_size).chunks

    def check(chunks: Sequence[Chunk]) -> None:
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(n_tokens))
        assert all(chunk.stop - chunk.start == chunk_tokens for chunk in chunks[:-1])
        local = [t for chunk in chunks for t in range(n_tokens)[chunk.rank_slice]]
        assert local == list(range(n_tokens // sp_size))

    check(chunks)
    shifted = tuple(Chunk(c.index, c.start + 1, c.stop + 1, c.rank_start, c.rank_stop) for c in chunks)
    assert_rejects(check, {"last chunk lost": chunks[:-1], "off by one": shifted, "twice": (*chunks, chunks[-1])})


@pytest.mark.parametrize(("n_tokens", "chunk_tokens", "sp_size"), PLANS)
def test_gathered_over_the_ranks_each_chunk_is_contiguous(n_tokens: int, chunk_tokens: int, sp_size: int) -> None:
    plan = ChunkPlan(n_tokens, chunk_tokens, sp_size)

    def check(ranks: Sequence[Sequence[int]]) -> None:
        assert sorted(t for rank in ranks for t in rank) == list(range(n_tokens))
        for chunk in plan.chunks:
            gathered = [t for rank in ranks for t in rank[chunk.rank_slice]]
            assert gathered == list(range(chunk.start, chunk.stop))

    ranks = [list(plan.rank_tokens(rank)) for rank in range(sp_size)]
    check(ranks)
    broken: dict[str, Sequence[Sequence[int]]] = {"a token lost": [rank[:-1] for rank in ranks]}
    if sp_size > 1:
        broken["ranks swapped"] = ranks[::-1]
    if sp_size > 1 and len(plan.chunks) > 1:
        size = n_tokens // sp_size
        broken["contiguous shards"] = [range(rank * size, (rank + 1) * size) for rank in range(sp_size)]
    assert_rejects(check, broken)


@pytest.mark.parametrize(
    ("n_tokens", "chunk_tokens", "sp_size", "name"),
    [(0, 8, 1, "n_tokens=0"), (8, 0, 1, "chunk_tokens=0"), (9, 8, 2, "n_tokens=9"), (8, 9, 2, "chunk_tokens=9")],
)
def test_sizes_that_do_not_fit_are_refused(n_tokens: int, chunk_tokens: int, sp_size: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*multiple of sp_size={sp_size}"):
        ChunkPlan(n_tokens, chunk_tokens, sp_size)


def read_keys(spans: Iterable[Span]) -> list[int]:
    return [key for span in spans for key in range(span.start, span.stop)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_tokens", [2**62, 64, 8, 7])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 7), (8, 9), (16, 23), (63, 70), (120, 127)])
def test_a_row_reads_every_key_once_and_its_diagonal_first(
    shape: RowShape, max_tokens: int, start: int, stop: int
) -> None:
    spans = row_spans(start, stop, shape=shape, unit_tokens=8, max_tokens=max_tokens)

    def check(spans: Sequence[Span]) -> None:
        diagonal, *full = spans
        assert read_keys([*full, diagonal]) == list(range(stop))
        assert diagonal.causal and diagonal.stop == stop and not any(span.causal for span in full)
        assert all(span.stop - span.start <= max_tokens for span in spans)
        # A causal call over more than the diagonal needs a kernel that aligns at the bottom right.
        assert diagonal.start == start or (shape == "prefix" and diagonal.start == 0)

    check(spans)
    diagonal, *full = spans
    broken = {
        "diagonal not masked": [Span(diagonal.start, diagonal.stop, False), *full],
        "diagonal twice": [*spans, diagonal],
        "a key too far": [Span(diagonal.start, stop + 1, True), *full],
    }
    if full:
        broken["a span lost"] = [diagonal, *full[1:]]
        broken["full span masked"] = [diagonal, *(Span(s.start, s.stop, True) for s in full)]
    assert_rejects(check, broken)


@pytest.mark.parametrize(
    ("shape", "max_tokens", "expected"),
    [
        ("prefix", 99, [(0, 20, True)]),
        ("prefix", 12, [(16, 20, True), (0, 12, False), (12, 16, False)]),
        ("rectangle", 99, [(16, 20, True), (0, 16, False)]),
        ("rectangle", 10, [(16, 20, True), (0, 10, False), (10, 16, False)]),
        ("pair", 99, [(16, 20, True), (0, 8, False), (8, 16, False)]),
        ("pair", 6, [(16, 20, True), (0, 6, False), (6, 12, False), (12, 16, False)]),
    ],
)
def test_row_spans_by_shape(shape: RowShape, max_tokens: int, expected: list[tuple[int, int, bool]]) -> None:
    spans = row_spans(16, 20, shape=shape, unit_tokens=8, max_tokens=max_tokens)
    assert [(span.start, span.stop, span.causal) for span in spans] == expected


@pytest.mark.parametrize(
    ("shape", "resident", "expected"),
    [
        ("prefix", 20, [(0, 20, True)]),
        ("prefix", 16, [(16, 20, True), (0, 16, False)]),
        ("prefix", 8, [(16, 20, True), (0, 8, False), (8, 12, False), (12, 16, False)]),
        ("rectangle", 8, [(16, 20, True), (0, 8, False), (8, 12, False), (12, 16, False)]),
        ("pair", 8, [(16, 20, True), (0, 4, False), (4, 8, False), (8, 12, False), (12, 16, False)]),
        ("prefix", 0, [(16, 20, True), (0, 4, False), (4, 8, False), (8, 12, False), (12, 16, False)]),
    ],
)
def test_keys_that_are_not_resident_come_chunk_by_chunk(
    shape: RowShape, resident: int, expected: list[tuple[int, int, bool]]
) -> None:
    spans = row_spans(16, 20, shape=shape, unit_tokens=4, resident_tokens=resident)
    assert [(span.start, span.stop, span.causal) for span in spans] == expected


@pytest.mark.parametrize("window", [None, 1, 2, 3, 8, 9, 17, 64, Block(1), Block(3), Block(8), Block(17), Block(64)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 50])
def test_a_window_says_which_chunks_are_read_and_how_many_pairs_are_computed(
    window: int | None, chunk_tokens: int
) -> None:
    plan = ChunkPlan(40, chunk_tokens)
    for chunk in plan.chunks:
        seen = {
            key
            for query in range(chunk.start, chunk.stop)
            for key in range(query + 1)
            if window is None or (key >= query - query % window if isinstance(window, Block) else key > query - window)
        }
        read = plan.read_by(chunk, window)
        assert min(seen) == first_key(chunk.start, window) and read[-1] is chunk
        assert {key // chunk_tokens for key in seen} == {each.index for each in read}
        # Half a pair for a query's own key, but for a window that is full.
        pairs = 0.0
        for query in range(chunk.start, chunk.stop):
            full = window is not None and not isinstance(window, Block) and query >= window
            pairs += query + 1 - first_key(query, window) - (0 if full else 0.5)
        assert seen_pairs(chunk.start, chunk.stop, window) == pytest.approx(pairs)


@pytest.mark.parametrize("block", [1, 3, 8, 17, 64])
def test_rows_of_blocks_have_one_first_key_and_meet(block: int) -> None:
    for chunk in ChunkPlan(40, 8).chunks:
        rows = query_rows(chunk.start, chunk.stop, Block(block))
        assert [query for row in rows for query in range(*row)] == list(range(chunk.start, chunk.stop))
        for start, stop in rows:
            assert {first_key(query, Block(block)) for query in range(start, stop)} == {first_key(start, Block(block))}
        assert query_rows(chunk.start, chunk.stop, block) == ((chunk.start, chunk.stop),)


def test_a_block_is_no_window_of_its_length() -> None:
    assert Block(8) != 8 and Block(8) == Block(8) and Block(8) != Block(9) and len({Block(8), 8, Block(8)}) == 2
