"""Which tokens are in which chunk, on which rank, and which keys a row reads. Integers only; no torch.

In reading order:

    chunks  the cut of a sequence, and the tokens of each rank
    spans   a row's keys, as kernel calls
"""

from .chunks import Chunk, ChunkPlan, chunk_choices
from .spans import Block, RowShape, Span, first_key, query_rows, row_spans, seen_pairs

__all__ = [
    "Block",
    "Chunk",
    "ChunkPlan",
    "RowShape",
    "Span",
    "chunk_choices",
    "first_key",
    "query_rows",
    "row_spans",
    "seen_pairs",
]
