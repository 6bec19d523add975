"""Telling an `Accelerator` of sequence-parallel groups, whose ranks read the same samples and cut them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import get_sampler
from accelerate.utils import DistributedType, DynamoBackend, broadcast
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from ..config import FPDTPlugin, resolve_chunk_tokens
from ..model import joins_rows, waiting_names
from ..parallel import JoinedRows, SequenceParallelGroup, ShardingCollator, build_group
from .packing import PackingCollator


def leave_to_host(model: nn.Module) -> None:
    """Tell DDP which weights wait on the host: it takes parameters of one kind of device; these have no gradients."""
    if names := waiting_names(model):
        told: Any = model
        told._ddp_params_and_buffers_to_ignore = names


def join_group(
    accelerator: Accelerator,
    plugin: FPDTPlugin,
    group: SequenceParallelGroup | None = None,
    *,
    by_mesh: bool = True,
) -> SequenceParallelGroup:
    """Make the accelerator's loaders give all of a group the same samples.

    Args:
        group: the group FPDT was applied with to the model already; None: one is built.
        by_mesh: whether a mesh tells loaders of groups; else the accelerator's processes must be groups.

    Raises:
        NotImplementedError, ValueError: as for `FPDTAccelerator`.
    """
    reasons = _refused_options(accelerator)
    started = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != started:
        reasons.append(
            f"it counts {accelerator.num_processes} process(es) where {started} were started, so each would train by "
            "itself; on a CPU pass cpu=True (use_cpu=True to TrainingArguments)"
        )
    if reasons:
        raise NotImplementedError(f"hf_fpdt: FPDT cannot run under this Accelerator: {'; '.join(reasons)}.")
    if group is None:
        group = build_group(plugin.sp_size)
    accelerator.dataloader_config.dispatch_batches = False  # the main process would send other samples to every rank
    if group.size > 1:
        # Its shuffling depends on a seed and the epoch alone, not on what a rank drew before.
        accelerator.dataloader_config.use_seedable_sampler = True
    if group.size > 1 and by_mesh:
        mesh = _LoaderMesh((accelerator.num_processes // group.size, group.size))
        accelerator._prepare_device_mesh = lambda: mesh
    return group


@contextmanager
def agreed_seeds(accelerator: Accelerator, group: SequenceParallelGroup, loader: DataLoader) -> Iterator[None]:
    """Inside, `loader` is prepared such that ranks shuffle alike, whatever their own seeds: the main process's counts.

    `RandomSampler` is seeded by Accelerate; other samplers that draw from the global generator get one of their own.
    """
    config, sampler = accelerator.dataloader_config, get_sampler(loader)
    before = config.data_seed
    if group.size > 1:
        seed = broadcast(torch.tensor(torch.initial_seed() % 2**63, device=accelerator.device))
        config.data_seed = int(seed) if before is None else before
        if not isinstance(sampler, RandomSampler) and getattr(sampler, "generator", 0) is None:
            sampler.generator = torch.Generator().manual_seed(int(seed))
    try:
        yield
    finally:
        config.data_seed = before


@dataclass(frozen=True)
class _LoaderMesh:
    """What Accelerate's loaders look at of a device mesh: ranks along "cp" read the same batches, other ranks others.

    A `DeviceMesh` would do, at the price of two more process groups.
    """

    shape: tuple[int, ...]
    mesh_dim_names: tuple[str, ...] = ("dp_shard", "cp")

    def __getitem__(self, name: str) -> _LoaderMesh:
        return _LoaderMesh((self.shape[self.mesh_dim_names.index(name)],), (name,))

    def size(self) -> int:
        """Ranks along the one dimension left."""
        return self.shape[0]


def sharding_collator(inner: Any, plugin: FPDTPlugin, group: SequenceParallelGroup, **more: Any) -> Any:
    """`inner` followed by the cut for this rank; `inner` itself where there is nothing to cut or it cuts already.

    Args:
        more: `on_gpu` (which "auto" chunk size holds); `pad_token_id`, `two_each` of `ShardingCollator`.

    Raises:
        ValueError: `inner` is a `ShardingCollator` of another cut than the model's.
    """
    chunk_tokens = resolve_chunk_tokens(plugin, on_gpu=more.pop("on_gpu"))
    cut = group.size, group.rank, chunk_tokens
    if isinstance(inner, ShardingCollator):
        if (theirs := (inner.sp_size, inner.rank, inner.chunk_tokens)) != cut:
            raise ValueError(
                f"hf_fpdt: the loader's ShardingCollator cuts for (sp_size, rank, chunk_tokens) = {theirs}, but the "
                f"model of this process takes {cut}: pass the inner collator, it is wrapped for you."
            )
        return inner
    return inner if group.size == 1 else ShardingCollator(inner, *cut, **more)


@contextmanager
def rows_joined(trainer: Any, *, is_training: bool) -> Iterator[None]:
    """Inside, a trainer's loader for training puts rows of several lengths into one packed row before they are cut.

    What is evaluated stays in rows, of which those that fill up a batch are left out. On one process a sequence the
    model joins rows itself.
    """
    collator = trainer.data_collator
    joins = is_training and isinstance(collator, ShardingCollator) and joins_rows(trainer.model)
    if joins and not isinstance(collator.inner, PackingCollator):
        trainer.data_collator = replace(collator, inner=JoinedRows(collator.inner))
    try:
        yield
    finally:
        trainer.data_collator = collator


def _refused_options(accelerator: Accelerator) -> list[str]:
    reasons = []
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        reasons.append(f"{kind.value} is not supported; use DDP or FSDP2")
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        reasons.append("FSDP version 1 is not supported; set fsdp_version: 2")
    if fsdp is not None and fsdp.activation_checkpointing:
        reasons.append("FSDP's activation checkpointing would keep and recompute everything twice; switch it off")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        reasons.append(
            "torch.compile (dynamo_backend, torch_compile) cannot trace a layer that is run in chunks; leave it out"
        )
    if accelerator.dispatch_batches:
        reasons.append("dispatch_batches=True gives every rank other samples; leave it off")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            reasons.append(f"ParallelismConfig({name}) is not supported; set FPDTPlugin(sp_size) instead")
    return reasons
