"""Which keys a query row reads, in which kernel calls. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .documents import Documents

# How a kernel wants the keys of one query row [start, stop):
#   prefix     one causal call over the keys [0, stop): the kernel's causal mask is bottom-right aligned
#   rectangle  one full call over [0, start), then the causal diagonal
#   pair       a full call for each earlier chunk, then the causal diagonal: few distinct shapes
RowShape = Literal["prefix", "rectangle", "pair"]


@dataclass(frozen=True, slots=True)
class Span:
    """Keys [start, stop) read in one kernel call; `causal` aligns the last key with the last query.

    Attributes:
        cuts: where documents begin behind `start`, among the keys and the queries alike: each sees its own alone.
    """

    start: int
    stop: int
    causal: bool
    cuts: tuple[int, ...] = ()


class Block(int):
    """A window of another kind: a query sees the keys of its own block of so many tokens, up to its own.

    Llama 4 calls it chunked attention. Blocks are counted from a document's first token. It is equal to no plain
    window, and to blocks of as many tokens alone.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Block, int(self)))

    def __repr__(self) -> str:
        return f"Block({int(self)})"


def first_key(query: int, window: int | None, documents: Documents | None = None) -> int:
    """The first key that a query sees: it sees the last `window` keys up to its own, or with None all of them.

    Args:
        documents: of a packed row: then those of its own document alone.
    """
    begins = 0 if documents is None else documents.start_of(query)
    if isinstance(window, Block):
        return query - (query - begins) % window
    return begins if window is None else max(begins, query - window + 1)


def row_cuts(start: int, stop: int, window: int | None, documents: Documents | None = None) -> tuple[int, ...]:
    """The queries inside of (start, stop) that see no key before their own: a document, or a block of it, begins."""
    begins = () if documents is None else documents.inside(start, stop)
    if not isinstance(window, Block):
        return begins
    first = 0 if documents is None else documents.start_of(start)
    cuts: list[int] = []
    for left, right in zip((first, *begins), (*begins, stop), strict=True):
        skipped = max(0, start - left) // window * window
        cuts += (edge for edge in range(left + skipped, right, window) if edge > start)
    return tuple(cuts)


def query_rows(
    start: int, stop: int, window: int | None, documents: Documents | None = None
) -> tuple[tuple[int, int], ...]:
    """The queries of [start, stop) in rows whose first keys follow one rule: a row for each document or block."""
    edges = (start, *row_cuts(start, stop, window, documents), stop)
    return tuple(zip(edges[:-1], edges[1:], strict=True))


def seen_pairs(start: int, stop: int, window: int | None, documents: Documents | None = None) -> float:
    """Pairs of a query of [start, stop) and a key that it sees.

    Its own key is half a pair while the window is not full, as in half a square; then a query has `window` pairs.
    """
    return _pairs_of_one(start, stop, window) if documents is None else _pairs_of_many(start, stop, window, documents)


def _pairs_of_one(start: int, stop: int, window: int | None) -> float:
    def before(query: int) -> float:
        if isinstance(window, Block):
            blocks, rest = divmod(query, window)
            return (blocks * window * window + rest * rest) / 2
        full = query if window is None else min(query, window)
        return full * full / 2 + (query - full) * full

    return before(stop) - before(start)


@lru_cache(maxsize=4096)
def _pairs_of_many(start: int, stop: int, window: int | None, documents: Documents) -> float:
    """Every layer of a step asks for the same chunks."""
    total = 0.0
    for left, right in query_rows(start, stop, None, documents):
        begins = documents.start_of(left)
        total += _pairs_of_one(left - begins, right - begins, window)
    return total


def row_spans(
    start: int,
    stop: int,
    *,
    shape: RowShape,
    unit_tokens: int,
    max_tokens: int = 2**62,
    resident_tokens: int = 2**62,
    first: int = 0,
) -> tuple[Span, ...]:
    """The kernel calls of the query row whose diagonal is the keys [start, stop): every key of [first, stop) once.

    The diagonal comes first: its keys are on the device already, and while it computes, the first others arrive.

    Args:
        start, stop: key positions of the row's first query and one past its last.
        shape: how the kernel wants its keys, see `RowShape`.
        unit_tokens: keys of one call for "pair", and for keys that are not resident.
        max_tokens: keys one call may take at most (32-bit indexing inside kernels).
        resident_tokens: keys [0, resident_tokens) lie side by side on the device; a multiple of `unit_tokens`.
        first: the first key that the row sees; its document begins there.
    """
    if shape == "prefix" and stop - first <= max_tokens and stop <= resident_tokens:
        return (Span(first, stop, True),)
    pair = shape == "pair"
    edge = max(first, min(start, resident_tokens))
    resident = _cut(first, edge, min(unit_tokens if pair else max_tokens, max_tokens), in_units=pair)
    streamed = _cut(edge, start, unit_tokens, in_units=True)
    return (Span(start, stop, True), *resident, *streamed)


def _cut(start: int, stop: int, step: int, *, in_units: bool) -> tuple[Span, ...]:
    """Full calls over [start, stop), of `step` keys at most; in units they end where chunks do, at multiples of it."""
    spans, left = [], start
    while left < stop:
        right = min((left // step + 1) * step if in_units else left + step, stop)
        spans.append(Span(left, right, False))
        left = right
    return tuple(spans)
