"""Which tokens a chunk holds, and who owns them. Integers only.

Rank-ordinal order (paper section 4.1, figure 6): chunk i of C tokens is cut in P pieces and rank r of the
sequence-parallel group owns piece r of EVERY chunk. Gathered over the group, a chunk is contiguous and in order: its
diagonal is causal, all left of it is full, and every rank has equal work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .documents import Documents
from .spans import first_key

# Below, a GPU's kernels wait for one another more than they compute.
LEAST_AUTO_CHUNK = 2048


def chunk_choices(most: int) -> Iterator[int]:
    """Tokens of a chunk that "auto" tries, the largest first: each half of the one before."""
    while most >= LEAST_AUTO_CHUNK:
        yield most
        most //= 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of the sequence; a rank holds [rank_start, rank_stop) of its own tokens."""

    index: int
    start: int
    stop: int
    rank_start: int
    rank_stop: int

    @property
    def rank_slice(self) -> slice:
        """The chunk's place in a rank's own hidden states."""
        return slice(self.rank_start, self.rank_stop)


@dataclass(frozen=True)
class ChunkPlan:
    """How a sequence of `n_tokens` is cut.

    Attributes:
        n_tokens: tokens of the whole sequence (over all ranks of the group); a multiple of `sp_size`.
        chunk_tokens: global tokens a chunk; a multiple of `sp_size`. The last chunk may be shorter.
        sp_size: ranks that share the sequence.

    Raises:
        ValueError: a size is not positive or not a multiple of `sp_size`.
    """

    n_tokens: int
    chunk_tokens: int
    sp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("n_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value < 1 or value % self.sp_size:
                raise ValueError(
                    f"ChunkPlan({name}={value}): a positive multiple of sp_size={self.sp_size} is expected; "
                    "pad the sequence on the right (label -100)."
                )

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks, ascending."""
        return tuple(self._chunk(i, start) for i, start in enumerate(range(0, self.n_tokens, self.chunk_tokens)))

    def _chunk(self, index: int, start: int) -> Chunk:
        stop = min(start + self.chunk_tokens, self.n_tokens)
        return Chunk(index, start, stop, start // self.sp_size, stop // self.sp_size)

    def read_by(self, chunk: Chunk, window: int | None, documents: Documents | None = None) -> tuple[Chunk, ...]:
        """The chunks, ascending, whose keys the queries of `chunk` read, its own at the end; see `spans.first_key`."""
        first = first_key(chunk.start, window, documents)
        return self.chunks[first // self.chunk_tokens : chunk.index + 1]

    def rank_pieces(self, rank: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the global tokens that `rank` owns in each chunk, in its local order."""
        for chunk in self.chunks:
            piece = (chunk.stop - chunk.start) // self.sp_size
            yield chunk.start + rank * piece, chunk.start + (rank + 1) * piece

    def rank_tokens(self, rank: int) -> Iterator[int]:
        """Global indices of the tokens that `rank` owns, in its local order."""
        for start, stop in self.rank_pieces(rank):
            yield from range(start, stop)
