"""Which tokens are in which chunk, on which rank, and which keys a row reads. Integers only; no torch.

In reading order:

    chunks             which tokens a chunk holds, and who owns them. Integers only
    spans              which keys a query row reads, in which kernel calls. Integers only
"""

from .chunks import Chunk, ChunkPlan
from .spans import RowShape, Span, row_spans

__all__ = [
    "Chunk",
    "ChunkPlan",
    "RowShape",
    "Span",
    "row_spans",
]
