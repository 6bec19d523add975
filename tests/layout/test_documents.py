"""Documents of a packed row against tokens looked at one by one."""

from __future__ import annotations

from functools import partial

import pytest

from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.layout.documents import Documents, Piece
from hf_fpdt.layout.spans import Block, first_key, query_rows, row_cuts, seen_pairs
from tests.helpers.packed import PACKINGS, moved, random_lengths
from tests.helpers.support import assert_rejects

ROWS = [*PACKINGS, *(random_lengths(seed, 40) for seed in range(6))]
WINDOWS = (None, 1, 3, 8, 9, 64, Block(1), Block(3), Block(8), Block(64))


def document_of(lengths: tuple[int, ...]) -> list[int]:
    """Of each token."""
    return [index for index, length in enumerate(lengths) for _ in range(length)]


def sees(lengths: tuple[int, ...], window: int | None, query: int) -> set[int]:
    """The keys that a query sees, by their definition."""
    owner = document_of(lengths)
    keys = {key for key in range(query + 1) if owner[key] == owner[query]}
    place = {key: key - min(k for k in range(40) if owner[k] == owner[query]) for key in keys}
    if isinstance(window, Block):
        return {key for key in keys if place[key] // window == place[query] // window}
    return keys if window is None else {key for key in keys if key > query - window}


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 8, 13, 40])
def test_pieces_are_the_chunk_by_document(lengths: tuple[int, ...], chunk_tokens: int) -> None:
    owner, exact = document_of(lengths), Documents.of_lengths(lengths)

    def check(documents: Documents) -> None:
        assert documents.lengths == lengths and documents.n_tokens == 40
        for chunk in ChunkPlan(40, chunk_tokens).chunks:
            pieces = documents.pieces(chunk)
            assert [token for piece in pieces for token in range(piece.start, piece.stop)] == list(
                range(chunk.start, chunk.stop)
            )
            for piece in pieces:
                assert len({owner[token] for token in range(piece.start, piece.stop)}) == 1
                assert piece.goes_on == (piece.start > 0 and owner[piece.start - 1] == owner[piece.start])
            assert documents.ends_at(chunk.stop) == (chunk.stop == 40 or owner[chunk.stop] != owner[chunk.stop - 1])

    check(exact)
    if 1 < len(lengths) < 40:
        assert_rejects(check, {"a boundary off by one": moved(exact), "one document": Documents((0,), 40)})


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_what_is_read_and_computed_is_what_queries_see(lengths: tuple[int, ...], window: int | None) -> None:
    documents = Documents.of_lengths(lengths)
    seen = [sees(lengths, window, query) for query in range(40)]

    def check(first: object, pairs: object) -> None:
        for chunk in ChunkPlan(40, 8).chunks:
            queries = range(chunk.start, chunk.stop)
            assert [first(query, window, documents) for query in queries] == [min(seen[q]) for q in queries]  # type: ignore[operator]
            # Half a pair for a query's own key, but for a window that is full.
            full = window is not None and not isinstance(window, Block)
            counted = sum(len(seen[q]) - 0.5 * (not full or _place(lengths, q) < (window or 0)) for q in queries)
            assert pairs(chunk.start, chunk.stop, window, documents) == pytest.approx(counted)  # type: ignore[operator]

    check(first_key, seen_pairs)
    for chunk in ChunkPlan(40, 8).chunks:
        keys = set().union(*(seen[query] for query in range(chunk.start, chunk.stop)))
        read = ChunkPlan(40, 8).read_by(chunk, window, documents)
        assert {key // 8 for key in keys} == {each.index for each in read} and read[-1] is not None
        rows = query_rows(chunk.start, chunk.stop, window, documents)
        assert [query for row in rows for query in range(*row)] == list(range(chunk.start, chunk.stop))
        begins = [q for q in range(chunk.start + 1, chunk.stop) if min(seen[q]) == q]
        cuts = row_cuts(chunk.start, chunk.stop, window, documents)
        assert set(cuts) <= set(begins) and (window in (1, Block(1)) or set(cuts) == set(begins))
    if 1 < len(lengths) < 40 and window is None:
        wrong = {"boundaries forgotten": partial(_without, first_key), "off by one": partial(_moved, first_key)}
        assert_rejects(lambda first: check(first, seen_pairs), wrong)


def _place(lengths: tuple[int, ...], query: int) -> int:
    owner = document_of(lengths)
    return query - owner.index(owner[query])


def _without(first: object, query: int, window: int | None, documents: Documents) -> int:
    return first(query, window)  # type: ignore[operator]


def _moved(first: object, query: int, window: int | None, documents: Documents) -> int:
    return first(query, window, moved(documents))  # type: ignore[operator]


def test_a_row_is_filled_up_with_a_document() -> None:
    documents = Documents.of_lengths([3, 5])
    assert documents.padded(8) is documents and documents.padded(11).lengths == (3, 5, 3)
    assert documents.pieces(ChunkPlan(8, 8).chunks[0]) == (Piece(0, 3, False), Piece(3, 8, False))
    assert hash(documents) == hash(Documents((0, 3), 8)) and documents == Documents((0, 3), 8)


@pytest.mark.parametrize("starts", [(), (1,), (0, 3, 3), (0, 5, 4), (0, 8), (0, 9)])
def test_starts_that_are_none_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend from 0"):
        Documents(starts, 8)
