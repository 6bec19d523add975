"""Accelerators of a job's processes: DDP, or FSDP2 as `accelerate launch` sets it up."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn


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
