"""Ranks that share a sequence, and what they exchange (Ulysses, paper section 4.1).

Axes: B batch, S tokens of a chunk (over all ranks), P ranks, N query heads, G key/value heads, H head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A rank may wait for the slowest of its group through a step of hours (checkpointing, the first compilation).
GROUP_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class SequenceParallelGroup:
    """The `size` ranks that share one sequence, and this process's `rank` among them.

    Attributes:
        process_group: torch's group; None for one rank. Left out when the object is copied or pickled, as torch's
            groups can be neither; the copy shares the group within a process and cannot communicate in another.
    """

    size: int = 1
    rank: int = 0
    process_group: Any = field(default=None, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallelGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceParallelGroup, (self.size, self.rank)

    def seq_to_heads(self, *parts_BSNH: Tensor) -> tuple[Tensor, ...]:
        """This rank's piece for all heads → the whole chunk for this rank's heads; one exchange for all `parts`.

        Args:
            parts_BSNH: [B, S/P, heads, H] each, S/P the same in all; heads a multiple of P.

        Returns:
            [B, S, heads/P, H] each.
        """
        if self.size == 1:
            return parts_BSNH
        by_rank = [part.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4) for part in parts_BSNH]
        # One copy: each part by rank, then all of them side by side, [P, B, S/P, heads · H]; MLA has two widths.
        received = self._exchange(torch.cat([part.flatten(3) for part in by_rank], dim=3))
        whole = received.transpose(0, 1).flatten(1, 2)
        return _parted(whole, [part.shape[3:] for part in by_rank])

    def heads_to_seq(self, *parts_BSNH: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `seq_to_heads`: [B, S, heads/P, H] each → [B, S/P, heads, H] each."""
        if self.size == 1:
            return parts_BSNH
        flat = [part.flatten(2) for part in parts_BSNH]
        together = flat[0] if len(flat) == 1 else torch.cat(flat, dim=2)
        by_rank = together.unflatten(1, (self.size, -1))  # [B, P, S/P, heads · H]
        received = self._exchange(by_rank.transpose(0, 1))
        pieces = _parted(received.permute(1, 2, 0, 3), [part.shape[2:] for part in parts_BSNH])
        return tuple(piece.flatten(2, 3) for piece in pieces)  # from [B, S/P, P, heads, H]

    def _exchange(self, by_rank: Tensor) -> Tensor:
        """Row r of dimension 0 goes to rank r; row r of the result came from it."""
        by_rank = by_rank.contiguous()
        received = torch.empty_like(by_rank)
        dist.all_to_all_single(received, by_rank, group=self.process_group)
        return received

    def own_heads(self, heads: int) -> slice:
        """This rank's of so many query heads, between the two exchanges."""
        return slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks of the group (a new tensor)."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.process_group)
        return total

    def gather(self, value: Tensor) -> list[Tensor]:
        """The tensor of each rank of the group, of one shape on all of them."""
        if self.size == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.process_group)
        return parts

    def of_first(self, value: Any) -> Any:
        """What the group's first rank has there, on all of them; the host waits for it. Its value must pickle."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.process_group, 0), group=self.process_group)
        return box[0]

    def extremes(self, values: Tensor, *, everywhere: bool = False) -> list[tuple[int, int]]:
        """The smallest and the largest of each whole number over the ranks of the group; the host waits for them.

        Args:
            everywhere: over all ranks of the job, where there are several.
        """
        everywhere = everywhere and dist.is_initialized()
        bounds = torch.stack([-values, values])
        if self.size > 1 or everywhere:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=None if everywhere else self.process_group)
        return [(-low, high) for low, high in zip(*bounds.tolist(), strict=True)]

    def kv_repeats(self, q_heads: int, kv_heads: int) -> int:
        """How often a key/value head is repeated so that P ranks get equal shares that fit their query heads."""
        check_heads(q_heads, self.size)
        return math.lcm(kv_heads, self.size) // kv_heads


def _parted(together: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Parts that lie side by side in the last dimension, that of each in two: (heads, H)."""
    parts = together.split([math.prod(shape) for shape in shapes], dim=-1)
    return tuple(part.unflatten(-1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True))


def check_heads(q_heads: int, sp_size: int) -> None:
    """Raise ValueError unless `sp_size` divides the query heads."""
    if q_heads % sp_size:
        divisors = [n for n in range(1, q_heads + 1) if q_heads % n == 0]
        raise ValueError(
            f"hf_fpdt: sp_size={sp_size} does not divide the model's {q_heads} query heads, so ranks cannot share "
            f"them; take one of {', '.join(map(str, divisors))}."
        )


def repeat_heads(x_BSGH: Tensor, times: int) -> Tensor:
    """Each head `times` times in a row."""
    return x_BSGH if times == 1 else x_BSGH.repeat_interleave(times, dim=2)


def sum_repeated_heads(dx_BSGH: Tensor, times: int) -> Tensor:
    """The gradient of `repeat_heads`: copies of a head added up, in fp32 at least."""
    if times == 1:
        return dx_BSGH
    wide = torch.promote_types(dx_BSGH.dtype, torch.float32)
    return dx_BSGH.unflatten(2, (-1, times)).sum(3, dtype=wide).to(dx_BSGH.dtype)


def how_to_start(processes: int, script: str = "SCRIPT") -> str:
    """So many processes of a script. Accelerate's option for a CPU starts one, whatever number it is given."""
    return (
        f"start them with accelerate launch --multi_gpu --num_processes {processes} {script} or torchrun "
        f"--nproc-per-node {processes} {script}, on a CPU too (accelerate launch --cpu starts one process, whatever "
        "--num_processes says)"
    )


@lru_cache(maxsize=1)
def _owned_by_python(job: Any) -> Any:
    """The job's group, which the cache holds until there is another one.

    DDP frees its reducer with the interpreter's lock in hand: were that the last owner of a destroyed gloo group, it
    would join a thread that may be waiting for the lock, and the process would not end (pytorch/pytorch#190489).
    Python frees a group without the lock.
    """
    return job


def build_group(sp_size: int) -> SequenceParallelGroup:
    """This process's group: contiguous ranks [i·P, (i+1)·P) of the world share a sequence. Every rank must call it.

    Raises:
        ValueError: `sp_size` does not divide the number of processes.
        RuntimeError: more than one rank is asked for and torch.distributed is not initialised.
    """
    if dist.is_initialized():
        _owned_by_python(dist.group.WORLD)
    if sp_size == 1:
        return SequenceParallelGroup()
    if not dist.is_initialized():
        raise RuntimeError(
            f"hf_fpdt: sp_size={sp_size} needs {sp_size} processes, but this is one: {how_to_start(sp_size)}; or set "
            "sp_size=1."
        )
    world = dist.get_world_size()
    if world % sp_size:
        raise ValueError(
            f"hf_fpdt: sp_size={sp_size} does not divide the {world} processes of this job; start a multiple of it."
        )
    own: Sequence[Any] = dist.new_subgroups_by_enumeration(
        [list(range(start, start + sp_size)) for start in range(0, world, sp_size)], timeout=GROUP_TIMEOUT
    )
    return SequenceParallelGroup(sp_size, dist.get_rank() % sp_size, own[0])
