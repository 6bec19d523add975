"""Ranks that share a sequence: groups, exchanges, the cut of a batch.

In reading order:

    group              ranks that share a sequence, and what they exchange (Ulysses, paper section 4.1)
    sharding           the cut of a batch over the ranks of a group: who makes it, and how a rank's part is known
"""

from .group import GROUP_TIMEOUT, SequenceParallelGroup, build_group, check_heads, repeat_heads, sum_repeated_heads
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
    "own_tokens",
    "ranks_of_batch",
    "repeat_heads",
    "sum_repeated_heads",
]
