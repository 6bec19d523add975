"""What ranks of a group find of their own tokens, made whole on every rank; each then makes the same loss of it.

Every rank computes the whole loss, so a rank's own gradient is that of the whole with respect to its own tokens. DDP
and FSDP2 average gradients over all ranks, while those of a group are parts of one sum: so each part counts `size`
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import ChunkPlan
from .group import SequenceParallelGroup
from .sharding import own_tokens


def gathered(group: SequenceParallelGroup, plan: ChunkPlan, parts_BS: Sequence[Tensor]) -> list[Tensor]:
    """Numbers about a rank's own tokens, [B, S/P] each and of one dtype, as [B, S] in the order of the sequence.

    Differentiable: its gradient is right where gradients of weights are averaged over all ranks, and every rank makes
    the same of the result.

    Args:
        plan: how the sequence was cut.
    """
    if group.size == 1:
        return list(parts_BS)
    whole: Tensor = _Gathered.apply(group, plan, torch.stack(list(parts_BS)))
    return list(whole)


def summed(group: SequenceParallelGroup, value: Tensor) -> Tensor:
    """The sum of the ranks' values, differentiable as `gathered` is."""
    if group.size == 1:
        return value
    total: Tensor = _Summed.apply(group, value)
    return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceParallelGroup, plan: ChunkPlan, own_KBS: Tensor) -> Tensor:
        ctx.group, ctx.plan = group, plan
        order = torch.cat([own_tokens(plan, rank, own_KBS.device) for rank in range(group.size)])
        together = torch.cat(group.gather(own_KBS), dim=2)
        return torch.empty_like(together).index_copy_(2, order, together)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_whole: Tensor) -> tuple[None, None, Tensor]:
        own = own_tokens(ctx.plan, ctx.group.rank, d_whole.device)
        return None, None, d_whole[:, :, own] * ctx.group.size


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceParallelGroup, value: Tensor) -> Tensor:
        ctx.size = group.size
        return group.sum(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[None, Tensor]:
        return None, d_total * ctx.size
