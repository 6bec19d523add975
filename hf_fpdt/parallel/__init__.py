"""Ranks that share a sequence: groups, exchanges, the cut of a batch.

In reading order:

    group         the ranks, and what they exchange (Ulysses)
    scans         recurrent layers: heads exchanged around a scan, the inputs that a convolution needs from the left
    documents     which tokens of a batch are one document
    packed_scans  recurrent layers over packed rows: scans and convolutions that start afresh at each document
    rows          the rows of a batch as one packed row
    sharding      the cut of a batch, and how a rank's part is known again
    whole_rows    what ranks find of their own tokens, made whole on every rank
"""

from .documents import (
    MARKS,
    batch_of,
    documents_of_batch,
    ignore_first_tokens,
    marked_documents,
    positions_of,
    text_positions,
    without_ends,
)
from .group import (
    GROUP_TIMEOUT,
    SequenceParallelGroup,
    build_group,
    check_heads,
    how_to_start,
    repeat_heads,
    sum_repeated_heads,
)
from .packed_scans import (
    ChunkDocuments,
    convolution_of_documents,
    kernel_behind,
    scan_marks,
    scan_of_documents,
)
from .rows import JoinedRows, Packing, Rows, batch_shape, lengths_under, marks_of, pack_arguments
from .scans import STATES, heads_of_scan, inputs_before, over_ranks, why_not_scan_heads
from .sharding import (
    PADDING_KEY,
    SAMPLE_KEY,
    ShardingCollator,
    batch_shared_by,
    check_shard,
    own_tokens,
    ranks_of_batch,
)
from .whole_rows import gathered, summed

__all__ = [
    "ChunkDocuments",
    "GROUP_TIMEOUT",
    "JoinedRows",
    "MARKS",
    "PADDING_KEY",
    "Packing",
    "Rows",
    "SAMPLE_KEY",
    "STATES",
    "SequenceParallelGroup",
    "ShardingCollator",
    "batch_of",
    "batch_shape",
    "batch_shared_by",
    "build_group",
    "check_heads",
    "check_shard",
    "convolution_of_documents",
    "documents_of_batch",
    "gathered",
    "heads_of_scan",
    "how_to_start",
    "ignore_first_tokens",
    "inputs_before",
    "kernel_behind",
    "lengths_under",
    "marked_documents",
    "marks_of",
    "over_ranks",
    "own_tokens",
    "pack_arguments",
    "positions_of",
    "ranks_of_batch",
    "repeat_heads",
    "scan_marks",
    "scan_of_documents",
    "sum_repeated_heads",
    "summed",
    "text_positions",
    "why_not_scan_heads",
    "without_ends",
]
