"""Which tokens are in which chunk, on which rank, and which keys a row reads. Integers only; no torch.

In reading order:

    documents  the documents of a packed row
    chunks     the cut of a sequence, and the tokens of each rank
    spans      a row's keys, as kernel calls
"""

from .chunks import Chunk, ChunkPlan, chunk_choices
from .documents import Documents, Piece
from .spans import Block, RowShape, Span, first_key, query_rows, row_cuts, row_spans, seen_pairs

__all__ = [
    "Block",
    "Chunk",
    "ChunkPlan",
    "Documents",
    "Piece",
    "RowShape",
    "Span",
    "chunk_choices",
    "first_key",
    "query_rows",
    "row_cuts",
    "row_spans",
    "seen_pairs",
]
