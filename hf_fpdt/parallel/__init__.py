"""Ranks that share a sequence: groups, exchanges, the cut of a batch.

In reading order:

    group     the ranks, and what they exchange (Ulysses)
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
from .sharding import SAMPLE_KEY, ShardingCollator, batch_shared_by, check_shard, own_tokens, ranks_of_batch

__all__ = [
    "GROUP_TIMEOUT",
    "SAMPLE_KEY",
    "SequenceParallelGroup",
    "ShardingCollator",
    "batch_shared_by",
    "build_group",
    "check_heads",
    "check_shard",
    "how_to_start",
    "own_tokens",
    "ranks_of_batch",
    "repeat_heads",
    "sum_repeated_heads",
]
