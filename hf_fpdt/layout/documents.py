"""The documents of a packed row: where each begins, and what follows for whoever reads a part of the row. Integers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol


class Tokens(Protocol):
    """Tokens [start, stop) of a row; a chunk is."""

    @property
    def start(self) -> int:
        """The first."""

    @property
    def stop(self) -> int:
        """One past the last."""


class Piece(NamedTuple):
    """Tokens [start, stop) of a row that are of one document.

    Attributes:
        goes_on: whether the document began before `start`.
    """

    start: int
    stop: int
    goes_on: bool


@dataclass(frozen=True)
class Documents:
    """A row of documents, one after another; a query sees keys of its own document alone.

    Attributes:
        starts: the first token of each, ascending from 0.
        n_tokens: of the row.

    Raises:
        ValueError: the starts do not ascend from 0, or one of them lies behind the row.
    """

    starts: tuple[int, ...]
    n_tokens: int

    def __post_init__(self) -> None:
        edges = (*self.starts, self.n_tokens)
        if edges[0] != 0 or any(left >= right for left, right in zip(edges[:-1], edges[1:], strict=True)):
            raise ValueError(
                f"Documents({_few(self.starts)}, n_tokens={self.n_tokens}): starts are expected to ascend from 0 and "
                "to stay below the number of tokens."
            )

    @classmethod
    def of_lengths(cls, lengths: Iterable[int]) -> Documents:
        """Of so many tokens each."""
        edges = tuple(accumulate(lengths, initial=0))
        return cls(edges[:-1], edges[-1])

    def __hash__(self) -> int:
        return self._hash  # asked for at every kernel call, of thousands of numbers

    @cached_property
    def _hash(self) -> int:
        return hash((self.starts, self.n_tokens))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each."""
        edges = (*self.starts, self.n_tokens)
        return tuple(right - left for left, right in zip(edges[:-1], edges[1:], strict=True))

    def start_of(self, token: int) -> int:
        """Where the document of a token begins."""
        return self.starts[bisect_right(self.starts, token) - 1]

    def inside(self, start: int, stop: int) -> tuple[int, ...]:
        """Where documents begin between `start` and `stop`, both left out."""
        return self.starts[bisect_right(self.starts, start) : bisect_left(self.starts, stop)]

    def ends_at(self, stop: int) -> bool:
        """Whether a document ends with the token before `stop`."""
        at = bisect_left(self.starts, stop)
        return stop == self.n_tokens or (at < len(self.starts) and self.starts[at] == stop)

    def pieces(self, chunk: Tokens) -> tuple[Piece, ...]:
        """The chunk's tokens by document, in order; only the first may go on with a document of the chunk before."""
        edges = (chunk.start, *self.inside(chunk.start, chunk.stop), chunk.stop)
        goes_on = self.start_of(chunk.start) < chunk.start
        return tuple(
            Piece(left, right, goes_on and left == chunk.start)
            for left, right in zip(edges[:-1], edges[1:], strict=True)
        )

    def padded(self, n_tokens: int) -> Documents:
        """The row filled up to so many tokens: what fills it is a document of its own."""
        return self if n_tokens == self.n_tokens else Documents((*self.starts, self.n_tokens), n_tokens)


def _few(starts: tuple[int, ...]) -> str:
    return f"starts={starts}" if len(starts) < 10 else f"starts=({', '.join(map(str, starts[:8]))}, …)"
