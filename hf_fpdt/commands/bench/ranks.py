"""The processes of one job, and the accelerators they train with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from ...parallel import GROUP_TIMEOUT


def fsdp2() -> FullyShardedDataParallelPlugin:
    """Layer by layer; every process has made the same weights, so none are sent."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )


def accelerator_of(kind: type[Any], model: nn.Module, *, sharded: bool, **options: Any) -> Accelerator:
    """A new accelerator for a model whose weights lie where they will train.

    Args:
        kind: `Accelerator`, or a class of it.
        sharded: FSDP2; False: DDP.
        options: more of `kind`'s.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    plugin = fsdp2() if sharded else None
    if on_cpu and plugin is not None:
        # Accelerate has FSDP2 for GPUs alone; gloo can do it too.
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    return kind(cpu=on_cpu, fsdp_plugin=plugin, **options)


def trains_every_weight(model: nn.Module) -> bool:
    """Which FSDP2 is for; adapters alone are trained under DDP."""
    return all(parameter.requires_grad for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of what FSDP2 left a part of here; every process must call it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`; torch's default group is theirs where there are several."""

    size: int = 1
    rank: int = 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; every process must call it."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes (a new tensor)."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes (a new tensor)."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def meet(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def part(self) -> str:
        """Which process it was, for people; nothing where there is one."""
        return f" (rank {self.rank} of {self.size})" if self.size > 1 else ""


def place(gpus: int) -> World:
    """This process's in a job of so many, by the variables that torch's launcher sets; no GPU is touched."""
    return World() if gpus == 1 else World(gpus, int(os.environ["RANK"]))


def join(world: World, device: str) -> None:
    """Take the GPU of this process, and make the group: NCCL, gloo for tensors of the host."""
    if world.size == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(world.rank)
    # A rank may wait long for one that pins memory or compiles; what hangs, --limit ends.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=GROUP_TIMEOUT)


def leave(world: World) -> None:
    """Together, so that none ends while another still talks to it."""
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
