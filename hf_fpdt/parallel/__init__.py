"""Ranks that share a sequence: groups, exchanges, the cut of a batch.

In reading order:

    group     the ranks, and what they exchange (Ulysses)
    scans     recurrent layers: heads exchanged around a scan, the inputs that a convolution needs from the left
    sharding  the cut of a batch, and how a rank's part is known again
"""

from .group import (
    GROUP_TIMEOUT,
    SequenceParallelGroup,
    build_group,
    check_heads,
    how_to_start,
    repeat_heads,
    sum_repeated_heads,
)
from .scans import STATES, heads_of_scan, inputs_before, over_ranks, why_not_scan_heads
from .sharding import SAMPLE_KEY, ShardingCollator, batch_shared_by, check_shard, own_tokens, ranks_of_batch

__all__ = [
    "GROUP_TIMEOUT",
    "SAMPLE_KEY",
    "STATES",
    "SequenceParallelGroup",
    "ShardingCollator",
    "batch_shared_by",
    "build_group",
    "check_heads",
    "check_shard",
    "heads_of_scan",
    "how_to_start",
    "inputs_before",
    "over_ranks",
    "own_tokens",
    "ranks_of_batch",
    "repeat_heads",
    "sum_repeated_heads",
    "why_not_scan_heads",
]
