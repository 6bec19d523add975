"""Which keys a query row reads, in which kernel calls. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How a kernel wants the keys of one query row [start, stop):
#   prefix     one causal call over the keys [0, stop): the kernel's causal mask is bottom-right aligned
#   rectangle  one full call over [0, start), then the causal diagonal
#   pair       a full call for each earlier chunk, then the causal diagonal: few distinct shapes
RowShape = Literal["prefix", "rectangle", "pair"]


@dataclass(frozen=True, slots=True)
class Span:
    """Keys [start, stop) read in one kernel call; `causal` aligns the last key with the last query."""

    start: int
    stop: int
    causal: bool


class Block(int):
    """A window of another kind: a query sees the keys of its own block of so many tokens, up to its own.

    Llama 4 calls it chunked attention. It is equal to no plain window, and to blocks of as many tokens alone.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Block, int(self)))

    def __repr__(self) -> str:
        return f"Block({int(self)})"


def first_key(query: int, window: int | None) -> int:
    """The first key that a query sees: it sees the last `window` keys up to its own, or with None all of them."""
    if isinstance(window, Block):
        return query - query % window
    return 0 if window is None else max(0, query - window + 1)


def query_rows(start: int, stop: int, window: int | None) -> tuple[tuple[int, int], ...]:
    """The queries of [start, stop) in rows whose first keys follow one rule: with blocks a row for each of them."""
    if not isinstance(window, Block):
        return ((start, stop),)
    edges = [start, *range(start - start % window + window, stop, window), stop]
    return tuple(zip(edges[:-1], edges[1:], strict=True))


def seen_pairs(start: int, stop: int, window: int | None) -> float:
    """Pairs of a query of [start, stop) and a key that it sees.

    Its own key is half a pair while the window is not full, as in half a square; then a query has `window` pairs.
    """

    def before(query: int) -> float:
        if isinstance(window, Block):
            blocks, rest = divmod(query, window)
            return (blocks * window * window + rest * rest) / 2
        full = query if window is None else min(query, window)
        return full * full / 2 + (query - full) * full

    return before(stop) - before(start)


def row_spans(
    start: int, stop: int, *, shape: RowShape, unit_tokens: int, max_tokens: int = 2**62, resident_tokens: int = 2**62
) -> tuple[Span, ...]:
    """The kernel calls of the query row whose diagonal is the keys [start, stop): every key of [0, stop) once.

    The diagonal comes first: its keys are on the device already, and while it computes, the first others arrive.

    Args:
        start, stop: key positions of the row's first query and one past its last.
        shape: how the kernel wants its keys, see `RowShape`.
        unit_tokens: keys of one call for "pair", and for keys that are not resident.
        max_tokens: keys one call may take at most (32-bit indexing inside kernels).
        resident_tokens: keys [0, resident_tokens) lie side by side on the device; a multiple of `unit_tokens`.
    """
    if shape == "prefix" and stop <= min(max_tokens, resident_tokens):
        return (Span(0, stop, True),)
    step = min(unit_tokens if shape == "pair" else max_tokens, max_tokens)
    edge = min(start, resident_tokens)
    resident = (Span(left, min(left + step, edge), False) for left in range(0, edge, step))
    streamed = (Span(left, min(left + unit_tokens, start), False) for left in range(edge, start, unit_tokens))
    return (Span(start, stop, True), *resident, *streamed)
