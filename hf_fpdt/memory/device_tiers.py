"""What a pass may keep where on this device: measured, agreed on by the ranks, planned, said, and pinned.

All of that is done once for each length, before the pass's first layer keeps anything; `checkpoints` and `kv` then put
tensors where the plan has them.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import FPDTPlugin
from ..parallel import SequenceParallelGroup
from ..plan import (
    Available,
    Budgets,
    BufferPool,
    ExistingBuffers,
    KVBytes,
    PassPlacement,
    StepSizes,
    TierAllocator,
    budgets_of,
    described,
    described_kv,
    has_room,
    plan_pass,
)
from .available import TrainingMemory, available
from .files import DiskStaging
from .pinned import PinnedMemory
from .transfers import Transfers

logger = logging.getLogger(__name__)


@dataclass
class DeviceMemory:
    """Memory of one device's stores."""

    transfers: Transfers
    pinned: PinnedMemory
    allocator: TierAllocator[Tensor]
    files: DiskStaging | None

    @property
    def pools(self) -> tuple[BufferPool[Tensor], BufferPool[Tensor]]:
        """Host buffers of checkpoints, and of K and V."""
        return self.allocator.pool, self.allocator.kv_pool

    def in_the_way(self) -> ExistingBuffers:
        """The host buffers that a pass must do with: all there are where some hold something, else none."""
        if not any(pool.used_bytes for pool in self.pools):
            return ExistingBuffers()
        return ExistingBuffers(*(dict(pool.made) for pool in self.pools))


class DeviceTiers:
    """Plans the passes of one model on one device, and has the memory for them.

    Args:
        plugin: policy and budgets.
        group: ranks that share a sequence, which must keep the same.
        training: what gradients and optimizer will still take of the device; None: nothing.

    Attributes:
        memory: of the device; None before the first layer runs.
        plans: of passes with a backward pass, by step and by layers that have one.
    """

    def __init__(self, plugin: FPDTPlugin, group: SequenceParallelGroup, training: TrainingMemory | None) -> None:
        self.plugin, self.group, self.training = plugin, group, training
        self.memory: DeviceMemory | None = None
        self.plans: dict[tuple[StepSizes, int], PassPlacement] = {}
        self._kv_plans: dict[StepSizes, KVBytes] = {}
        self._had: dict[tuple[StepSizes, int], ExistingBuffers] = {}  # the buffers that were in the way of each plan
        self._there: Available | None = None

    def plan_kv(self, step: StepSizes, device: torch.device, *, everywhere: bool) -> KVBytes:
        """Where K and V of a pass without a backward pass lie: settled and said once for a step."""
        memory = self.on(device)
        if step not in self._kv_plans:
            budgets = self._budgets(step, device, everywhere=everywhere)
            memory.allocator.kv_pool.limit = budgets.host
            self._kv_plans[step] = step.kv_bytes(budgets.device)
            self._say(described_kv(self._kv_plans[step], step))
        return self._kv_plans[step]

    def plan_pass(self, first: int, step: StepSizes, device: torch.device, *, everywhere: bool) -> PassPlacement:
        """What a pass does with its memory: made and said once for a step. Its budgets are set, its buffers are there.

        Args:
            first: the lowest layer with a backward pass.
            everywhere: all ranks of the job keep the same, not those alone that share a sequence.

        Raises:
            MemoryError: no plan fits.
        """
        if everywhere:
            # What is rebuilt gathers weights: ranks with shorter sequences do as the longest.
            sizes = torch.tensor([step.plan.n_tokens, step.batch], device=device)
            (_, n_tokens), (_, batch) = self.group.extremes(sizes, everywhere=True)
            step = replace(step, plan=replace(step.plan, n_tokens=n_tokens), batch=batch)
        memory, key = self.on(device), (step, step.model.layers - first)
        have, new = memory.in_the_way(), key not in self.plans
        budgets = self._budgets(step, device, everywhere=everywhere)
        if new or self._had[key] != have:
            memory.allocator.kv_pool.limit = budgets.host
            # What is free between buffers in use may be too short for any other.
            left = replace(budgets, host=budgets.host - memory.pinned.gap_bytes) if have else budgets
            self.plans[key] = plan_pass(self.plugin.checkpoints, step, key[1], left, have)
            self._had[key] = have
        plan = self.plans[key]
        grew = _reserve(memory, plan, step)
        if new or grew:
            self._say(described(plan, step, budgets), important=grew)
        memory.allocator.budgets, memory.allocator.pool.limit = plan.budgets, plan.budgets.host
        return plan

    def _say(self, text: str, *, important: bool = False) -> None:
        few = len(self.plans) + len(self._kv_plans) <= 2
        logger.log(logging.INFO if important or few else logging.DEBUG, "hf_fpdt: %s", text)

    def has_room(self, step: StepSizes, device: torch.device) -> bool:
        """Whether a step of this rank alone fits into what there is."""
        self.on(device)
        return has_room(self.plugin, step, self._available(step, device, everywhere=False))

    def _budgets(self, step: StepSizes, device: torch.device, *, everywhere: bool) -> Budgets:
        return budgets_of(self.plugin, step, self._available(step, device, everywhere=everywhere))

    def _available(self, step: StepSizes, device: torch.device, *, everywhere: bool) -> Available:
        """Measured once, before the first pass, by all ranks together: ranks whose plans differed would hang."""
        if self._there is None:
            training = 0 if self.training is None else self.training()
            own = available(self.plugin, device, training, step.entry_bytes)
            values = torch.tensor([own.device, own.host, own.disk], device=device)
            self._there = Available(*(low for low, _ in self.group.extremes(values, everywhere=everywhere)))
        return self._there

    def on(self, device: torch.device) -> DeviceMemory:
        """Memory of the stores on this device; made when it is asked for first."""
        if self.memory is None or self.memory.transfers.device != device:
            self.close()
            transfers, pinned = Transfers(device), PinnedMemory(device)
            files = None if self.plugin.disk_dir is None else DiskStaging(self.plugin.disk_dir, transfers)
            allocator = TierAllocator(Budgets(0, 0), *(BufferPool(pinned.buffer, 0) for _ in range(2)))
            self.memory = DeviceMemory(transfers, pinned, allocator, files)
        return self.memory

    def close(self) -> None:
        """Give all memory back; plans are made anew."""
        self.plans.clear()
        self._kv_plans.clear()
        self._had.clear()
        self._there = None
        if self.memory is not None:
            self.memory.pinned.release()
            if self.memory.files is not None:
                self.memory.files.close()
        self.memory = None


def _reserve(memory: DeviceMemory, plan: PassPlacement, step: StepSizes) -> bool:
    """Have the pinned buffers that the plan needs beside those in the way; whether memory was pinned for them.

    Where none are, what is pinned gets cut anew, so that a step has the buffers it was predicted to have.
    """
    forecast = plan.forecast
    if forecast.disk_bytes:
        assert memory.files is not None
        memory.files.stage_for(step.layer_bytes().longest)
    needed, needed_kv = Counter(forecast.new_buffers), Counter(forecast.new_kv_buffers)
    if not memory.in_the_way():
        if [pool.made for pool in memory.pools] == [needed, needed_kv]:
            return False
        for pool in memory.pools:
            pool.clear()
        memory.pinned.recut()
    memory.pinned.limit, before = plan.pinned + memory.pinned.gap_bytes, memory.pinned.seconds
    for size, buffer in memory.pinned.buffers(needed + needed_kv):
        if needed[size]:
            needed[size] -= 1
            memory.allocator.pool.add(size, buffer)
        else:
            memory.allocator.kv_pool.add(size, buffer)
    return memory.pinned.seconds > before
