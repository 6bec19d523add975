"""What backward needs of the forward pass, by (layer, chunk): kept, and fetched before it is asked for.

Last in, first out over device, host and files, by the rule of `keep` and the placement of `shelves`. Copies out
overlap the layer that follows; in the backward pass the reads to come are known, and the next are always on their way.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import FPDTPlugin
from ..layout import Chunk
from ..parallel import SequenceParallelGroup
from ..plan import (
    LOOKAHEAD,
    SOON,
    Available,
    Budgets,
    BufferPool,
    ExistingBuffers,
    ForwardOrder,
    KVBytes,
    PassPlacement,
    Slot,
    StepSizes,
    Tier,
    TierAllocator,
    budgets_of,
    described,
    forward_bytes,
    plan_pass,
)
from ..units import GIB
from .available import available
from .entries import DeviceEntry, DiskTierEntry, Entry, HostEntry
from .files import DiskStaging
from .one_thread import OneThread
from .pinned import PinnedMemory
from .streamed_kv import HostMemory
from .training import TrainingMemory
from .transfers import Transfers

logger = logging.getLogger(__name__)


@dataclass
class _Tiers:
    """Memory of one device's stores; made when the first layer runs."""

    transfers: Transfers
    pinned: PinnedMemory
    shelves: TierAllocator[Tensor]
    files: DiskStaging | None

    @property
    def pools(self) -> tuple[BufferPool[Tensor], BufferPool[Tensor]]:
        """Host buffers of checkpoints, and of K and V."""
        return self.shelves.pool, self.shelves.kv_pool

    def in_the_way(self) -> ExistingBuffers:
        """The host buffers that a pass must do with: all there are where some hold something, else none."""
        if not any(pool.used_bytes for pool in self.pools):
            return ExistingBuffers()
        return ExistingBuffers(*(dict(pool.made) for pool in self.pools))


class ModelPass:
    """One forward pass through the layers, with the backward pass that follows.

    Attributes:
        plan: what it does with its memory.
        first_layer: the lowest layer with a backward pass; layers are counted from it in `plan`.
    """

    def __init__(self, plan: PassPlacement, step: StepSizes, first_layer: int) -> None:
        self.plan, self.first_layer = plan, first_layer
        self.order = ForwardOrder(forward_bytes(plan.kept, step.layer_bytes()), plan.budgets)


class Run(Protocol):
    """What the store asks of a layer's run."""

    @property
    def index(self) -> int:
        """The layer's place among the model's."""

    @property
    def step(self) -> StepSizes:
        """Sizes of the step."""

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the layer, so that all ranks of the job must run the same layers in the same order."""


class CheckpointStore:
    """Checkpoints of all layers of one model, and the memory that they and K, V share.

    Args:
        plugin: policy and budgets.
        group: ranks that share a sequence, which must keep the same.
        training: what gradients and optimizer will still take of the device; None: nothing.

    Attributes:
        one_thread: who is in a layer.
    """

    def __init__(
        self, plugin: FPDTPlugin, group: SequenceParallelGroup, training: TrainingMemory | None = None
    ) -> None:
        self._plugin, self._group, self._training = plugin, group, training
        self._tiers: _Tiers | None = None
        self._plans: dict[tuple[StepSizes, int], PassPlacement] = {}
        self._had: dict[tuple[StepSizes, int], ExistingBuffers] = {}  # the buffers that were in the way of each plan
        self._there: Available | None = None
        self._reads: deque[Entry] = deque()
        self._pass: ModelPass | None = None
        self._last: weakref.ref[Any] | None = None
        self.one_thread = OneThread()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointStore:
        # A copied model has memory of its own: streams and pinned buffers cannot be copied.
        return CheckpointStore(self._plugin, self._group, copy.deepcopy(self._training, memo))

    def train_with(self, optimizer: Any) -> None:
        """What "auto" leaves for training is what this optimizer takes."""
        if self._training is not None:
            self._training.optimizer = weakref.ref(optimizer)

    def join(self, run: Run, device: torch.device) -> tuple[LayerCheckpoint, Any]:
        """The checkpoint of a layer that runs forward now, and the run of the layer below in its pass, if any."""
        below = None if self._last is None else self._last()
        if below is None or (below.index + 1, below.step) != (run.index, run.step):
            below, self._pass = None, self._new_pass(run, device)
        assert self._pass is not None
        self._last = weakref.ref(run)
        return LayerCheckpoint(self, self._pass, run.index - self._pass.first_layer), below

    def _new_pass(self, run: Run, device: torch.device) -> ModelPass:
        step = run.step
        if run.sharded:
            # What is rebuilt gathers weights: ranks with shorter sequences do as the longest.
            sizes = torch.tensor([step.plan.n_tokens, step.batch], device=device)
            (_, n_tokens), (_, batch) = self._group.extremes(sizes, everywhere=True)
            step = replace(step, plan=replace(step.plan, n_tokens=n_tokens), batch=batch)
        plan = self._plan(step, step.model.layers - run.index, device, sharded=run.sharded)
        shelves = self._on(device).shelves
        shelves.budgets, shelves.pool.limit = plan.budgets, plan.budgets.host
        return ModelPass(plan, run.step, run.index)

    def kv_plan(self, run: Run, device: torch.device) -> KVBytes:
        """Which chunks of K and V are resident in the passes of a step."""
        return self._plan(run.step, 0, device, sharded=run.sharded).kv

    def _plan(self, step: StepSizes, layers: int, device: torch.device, *, sharded: bool) -> PassPlacement:
        """What a pass of this step does with its memory: made and said once, and its buffers are there.

        Args:
            layers: layers with a backward pass; 0 for a pass without.

        Raises:
            MemoryError: no plan fits.
        """
        tiers, key = self._on(device), (step, layers)
        have, new = tiers.in_the_way() if layers else ExistingBuffers(), key not in self._plans
        if new or self._had[key] != have:
            budgets = self._budgets(step, device, everywhere=sharded)
            tiers.shelves.kv_pool.limit = budgets.host
            # What is free between buffers in use may be too short for any other.
            left = replace(budgets, host=budgets.host - tiers.pinned.gap_bytes) if have else budgets
            self._plans[key] = plan_pass(self._plugin.checkpoints, step, layers, left, have)
            self._had[key] = have
        plan = self._plans[key]
        grew = layers > 0 and _reserve(tiers, plan, step)
        if new or grew:
            level = logging.INFO if grew or len(self._plans) <= 2 else logging.DEBUG
            budgets = self._budgets(step, device, everywhere=sharded)
            logger.log(level, "hf_fpdt: %s", described(plan, step, budgets))
        return plan

    def _budgets(self, step: StepSizes, device: torch.device, *, everywhere: bool) -> Budgets:
        return budgets_of(self._plugin, step, self._available(step, device, everywhere=everywhere))

    def _available(self, step: StepSizes, device: torch.device, *, everywhere: bool) -> Available:
        """Measured once, before the first pass, by all ranks together: ranks whose plans differed would hang."""
        if self._there is None:
            training = 0 if self._training is None else self._training()
            own = available(self._plugin, device, training, step.entry_bytes)
            values = torch.tensor([own.device, own.host, own.disk], device=device)
            self._there = Available(*(low for low, _ in self._group.extremes(values, everywhere=everywhere)))
        return self._there

    def _on(self, device: torch.device) -> _Tiers:
        if self._tiers is None or self._tiers.transfers.device != device:
            self.close()
            transfers, pinned = Transfers(device), PinnedMemory(device)
            files = None if self._plugin.disk_dir is None else DiskStaging(self._plugin.disk_dir, transfers)
            shelves = TierAllocator(Budgets(0, 0), *(BufferPool(pinned.buffer, 0) for _ in range(2)))
            self._tiers = _Tiers(transfers, pinned, shelves, files)
        return self._tiers

    def room(self, device: torch.device) -> HostMemory:
        """Where K and V that are not resident go."""
        tiers = self._on(device)
        return HostMemory(tiers.transfers, tiers.shelves)

    def keep(self, value: Tensor, name: str, order: tuple[Tier, ...], *, alone: bool) -> Entry:
        """Keep a tensor on the first tier of `order` that has room.

        Args:
            alone: on the device a part of a longer tensor is copied, so that it does not hold the rest.

        Raises:
            MemoryError: none has.
        """
        tiers = self._tiers
        assert tiers is not None
        nbytes = value.numel() * value.element_size()
        place = tiers.shelves.place(nbytes, order)
        if place is None:
            raise MemoryError(_no_room(nbytes, tiers.shelves))
        entry = None
        try:
            entry = _entry(tiers, value, name, place, alone=alone)
        finally:
            if entry is None:  # out of memory, a full disk: who goes on after it finds the place free
                tiers.shelves.leave(place)
        return entry

    def expect(self, reads: Iterable[Entry]) -> None:
        """The entries that will be read next, in order: the first few are brought to the device from now on."""
        self._reads = deque(reads)
        self._begin_next()

    def read(self, entry: Entry) -> Tensor:
        """An entry's tensor on the device; the reads after it are on their way."""
        value = entry.get()
        if self._reads and self._reads[0] is entry:
            self._reads.popleft()
        else:
            self._reads.clear()  # what follows is not what was expected
        self._begin_next()
        return value

    def _begin_next(self) -> None:
        for entry in islice(self._reads, LOOKAHEAD):
            entry.begin()

    def used_bytes(self) -> dict[str, int]:
        """Bytes in use on each tier, and "pinned": all host memory that is, used or free."""
        if self._tiers is None:
            return {}
        shelves = self._tiers.shelves
        return {**{tier: shelves.used[tier] for tier in SOON}, "pinned": self._tiers.pinned.nbytes}

    @property
    def pinning_seconds(self) -> float:
        """Time spent on pinning host memory so far."""
        return 0.0 if self._tiers is None else self._tiers.pinned.seconds

    @property
    def plans(self) -> Mapping[tuple[StepSizes, int], PassPlacement]:
        """The plans made so far, by step and by layers with a backward pass."""
        return MappingProxyType(self._plans)

    def close(self) -> None:
        """Give all memory back: host buffers, files. The next pass starts anew."""
        self._reads.clear()
        self._plans.clear()
        self._had.clear()
        self._there, self._pass, self._last = None, None, None
        if self._tiers is not None:
            self._tiers.pinned.release()
            if self._tiers.files is not None:
                self._tiers.files.close()
        self._tiers = None


def _entry(tiers: _Tiers, value: Tensor, name: str, place: Slot[Tensor], *, alone: bool) -> Entry:
    if place.tier == "device":
        value = value.clone() if alone and value.untyped_storage().nbytes() > place.nbytes else value
        return DeviceEntry(value, place, tiers.shelves, name)
    if place.tier == "host":
        return HostEntry(value, place, tiers.shelves, tiers.transfers)
    assert tiers.files is not None
    return DiskTierEntry(value, place, tiers.shelves, tiers.files)


def _reserve(tiers: _Tiers, plan: PassPlacement, step: StepSizes) -> bool:
    """Have the pinned buffers that the plan needs beside those in the way; whether memory was pinned for them.

    Where none are, what is pinned gets cut anew, so that a step has the buffers it was foretold to have.
    """
    foretold = plan.foretold
    assert foretold is not None
    if foretold.disk_bytes:
        assert tiers.files is not None
        tiers.files.stage_for(step.layer_bytes().longest)
    needed, needed_kv = Counter(foretold.new_buffers), Counter(foretold.new_kv_buffers)
    if not tiers.in_the_way():
        if [pool.made for pool in tiers.pools] == [needed, needed_kv]:
            return False
        for pool in tiers.pools:
            pool.clear()
        tiers.pinned.recut()
    tiers.pinned.limit, before = plan.pinned + tiers.pinned.gap_bytes, tiers.pinned.seconds
    for size, buffer in tiers.pinned.buffers(needed + needed_kv):
        if needed[size]:
            needed[size] -= 1
            tiers.shelves.pool.add(size, buffer)
        else:
            tiers.shelves.kv_pool.add(size, buffer)
    return tiers.pinned.seconds > before


def _no_room(nbytes: int, shelves: TierAllocator[Tensor]) -> str:
    pool = shelves.pool
    return (
        f"fpdt: no room for {nbytes / GIB:.2f} GiB more of checkpoints: {shelves.used['device'] / GIB:.2f} of "
        f"{shelves.budgets.device / GIB:.2f} GiB are in use on the device, {pool.used_bytes / GIB:.2f} of "
        f"{pool.limit / GIB:.2f} GiB on the host. Passes whose backward pass has not run yet hold theirs: run it, or "
        "raise device_budget_gib, host_budget_gib or disk_dir."
    )


class LayerCheckpoint:
    """What one layer's backward pass needs of its forward pass, by name and chunk; each entry is taken once.

    Attributes:
        keeps_input: whether its forward pass puts "input"; what does not is rebuilt in backward.
        keeps_attention: whether it puts "out" and "lse"; else attention runs again.
    """

    def __init__(self, store: CheckpointStore, run: ModelPass, index: int) -> None:
        self._store, self._pass = store, run
        self.keeps_input = run.plan.kept.inputs[index]
        self.keeps_attention = run.plan.kept.attentions[index]
        self._entries: dict[tuple[str, int], Entry] = {}
        self._unsettled: list[Entry] = []

    @property
    def plan(self) -> PassPlacement:
        """The plan of its pass."""
        return self._pass.plan

    def put(self, name: str, chunk: Chunk, value: Tensor, *, rebuilt: bool = False) -> None:
        """Keep `value` under (name, chunk)."""
        nbytes = value.numel() * value.element_size()
        order = SOON if rebuilt else self._pass.order.next(nbytes)
        # A part of a longer tensor holds all of it: on the device the parts stay such only if all do.
        alone = chunk.index > 0 and not isinstance(self._entries.get((name, 0)), DeviceEntry)
        entry = self._store.keep(value, f"{name!r} of chunk {chunk.index}", order, alone=alone)
        self._entries[name, chunk.index] = entry
        self._unsettled.append(entry)

    def settle(self) -> None:
        """Whatever was put so far may leave the device: the computation waits for copies that still run."""
        for entry in self._unsettled:
            entry.settle()
        self._unsettled.clear()

    def holds(self, name: str, chunk: Chunk) -> bool:
        """Whether `take` would find (name, chunk)."""
        return (name, chunk.index) in self._entries

    def take(self, name: str, chunk: Chunk) -> Tensor:
        """Hand (name, chunk) over and forget it; raises as `peek`."""
        value = self.peek(name, chunk)
        self._entries.pop((name, chunk.index)).free()
        return value

    def peek(self, name: str, chunk: Chunk) -> Tensor:
        """(name, chunk), which stays in the record.

        Raises:
            RuntimeError: it was taken before, as by a second backward pass through the same graph, or somebody wrote
                to it since it was put.
        """
        if not self.holds(name, chunk):
            raise RuntimeError(
                f"The checkpoint {name!r} of chunk {chunk.index} was used before: FPDT frees what a layer kept as its "
                "backward pass goes, so one forward pass serves one backward pass. Run the forward pass again."
            )
        return self._store.read(self._entries[name, chunk.index])

    def entries(self, *names: str, chunks: Iterable[Chunk]) -> Iterator[Entry]:
        """The entries of these names that are there, chunk by chunk; for `CheckpointStore.expect`."""
        keys = ((name, chunk.index) for chunk in chunks for name in names)
        yield from (self._entries[key] for key in keys if key in self._entries)

    def expect(self, reads: Iterable[Entry]) -> None:
        """See `CheckpointStore.expect`."""
        self._store.expect(reads)

    def __del__(self) -> None:
        # A graph that never ran backward: its memory goes with it.
        for entry in self._entries.values():
            entry.free()
