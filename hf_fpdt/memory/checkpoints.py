"""What backward needs of the forward pass, by (layer, chunk): kept, and fetched before it is asked for.

Last in, first out over device, host and files, by the rule of `plan.checkpointing` and the allocator of `plan.tiers`.
Copies out overlap the layer that follows; in the backward pass the reads to come are known, and the next are always on
their way.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
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
    KeptChunks,
    KVBytes,
    LinearBytes,
    PassPlacement,
    Slot,
    StepSizes,
    Tier,
    TierAllocator,
    forward_order,
)
from ..units import GIB
from .available import TrainingMemory
from .device_tiers import DeviceMemory, DeviceTiers
from .entries import DeviceEntry, DiskTierEntry, Entry, HostEntry
from .one_thread import OneThread
from .streamed_kv import HostMemory


class Run(Protocol):
    """What a pass asks of a layer's run."""

    @property
    def index(self) -> int:
        """The layer's place among the model's."""

    @property
    def step(self) -> StepSizes:
        """Sizes of the step."""


class ModelPass:
    """One forward pass through the layers, with the backward pass that follows; it is planned before it begins.

    Attributes:
        plan: what it does with its memory.
        sizes: bytes of what its layers may keep.
        first_layer: the lowest layer with a backward pass; layers are counted from it in `plan`.
    """

    def __init__(self, store: CheckpointStore, plan: PassPlacement, step: StepSizes, first_layer: int) -> None:
        self._store, self._step, self.plan, self.first_layer = store, step, plan, first_layer
        self.sizes = step.layer_bytes(plan.kept.layers)
        self.order = forward_order(plan.kept, self.sizes, plan.budgets)
        self._leaving: list[Entry] = []
        self._last: weakref.ref[Any] | None = None

    def awaits(self, index: int, step: StepSizes) -> bool:
        """Whether this layer is the next one: the one above the last, whose run is still there, in the same step."""
        last = None if self._last is None else self._last()
        return last is not None and (last.index + 1, self._step) == (index, step)

    def settle(self, leaving: list[Entry]) -> None:
        """Copies of a chunk's linears may take as long as the next chunk: those of the one before are waited for."""
        for entry in self._leaving:
            entry.settle()
        self._leaving = leaving

    def enter(self, run: Run) -> tuple[LayerCheckpoint, Any]:
        """The checkpoint of the next layer, which runs forward now, and the run of the layer below it, if any."""
        below = None if self._last is None else self._last()
        self._last = weakref.ref(run)
        return LayerCheckpoint(self._store, self, run.index - self.first_layer), below


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
        self._tiers = DeviceTiers(plugin, group, training)
        self._reads: deque[Entry] = deque()
        self._held: weakref.WeakSet[LayerCheckpoint] = weakref.WeakSet()
        self._pass: ModelPass | None = None
        self.one_thread = OneThread()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointStore:
        # A copied model has memory of its own: streams and pinned buffers cannot be copied.
        tiers = self._tiers
        # Known before the model is copied, whose layers hold the store.
        memo[id(self)] = copied = CheckpointStore(tiers.plugin, tiers.group)
        copied._tiers.training = copy.deepcopy(tiers.training, memo)
        return copied

    def train_with(self, optimizer: Any) -> None:
        """What "auto" leaves for training is what this optimizer takes."""
        if self._tiers.training is not None:
            self._tiers.training.optimizer = weakref.ref(optimizer)

    def pass_of(self, layer: int, step: StepSizes, device: torch.device, is_sharded: bool) -> ModelPass:
        """The pass that a layer is about to enter: the present one if it awaits the layer, else one planned now.

        Args:
            layer: its place among the model's layers; with a backward pass.
            is_sharded: whether FSDP2 shards layers, so that all ranks must keep the same of them.

        Raises:
            MemoryError: no plan fits.
        """
        if self._pass is None or not self._pass.awaits(layer, step):
            plan = self._tiers.plan_pass(layer, step, device, everywhere=is_sharded)
            self._pass = ModelPass(self, plan, step, layer)
        return self._pass

    def kv_plan(self, step: StepSizes, device: torch.device, is_sharded: bool) -> KVBytes:
        """Which chunks of K and V are resident in a pass without a backward pass."""
        return self._tiers.plan_kv(step, device, everywhere=is_sharded)

    def has_room(self, step: StepSizes, device: torch.device) -> bool:
        """Whether a step of this rank alone fits, before anything of it is planned."""
        return self._tiers.has_room(step, device)

    def host_memory(self, device: torch.device) -> HostMemory:
        """Where K and V that are not resident go."""
        memory = self._tiers.on(device)
        return HostMemory(memory.transfers, memory.allocator)

    def keep(self, value: Tensor, name: str, order: tuple[Tier, ...], *, alone: bool) -> Entry:
        """Keep a tensor on the first tier of `order` that has room.

        Args:
            alone: on the device a part of a longer tensor is copied, so that it does not hold the rest.

        Raises:
            MemoryError: none has.
        """
        memory = self._tiers.memory
        assert memory is not None
        nbytes = value.numel() * value.element_size()
        place = memory.allocator.place(nbytes, order)
        if place is None and self._drop_linears():
            place = memory.allocator.place(nbytes, order)
        if place is None:
            raise MemoryError(_no_room(nbytes, memory.allocator))
        return self._put(value, name, place, alone=alone)

    def keep_linear(self, holder: LayerCheckpoint, value: Tensor, name: str, tier: Tier) -> Entry | None:
        """Keep the output of a linear on its tier if there is room; it goes where other entries need the room."""
        memory = self._tiers.memory
        assert memory is not None
        place = memory.allocator.place(value.numel() * value.element_size(), (tier,))
        if place is None:
            return None
        self._held.add(holder)
        return self._put(value, name, place, alone=True)

    def _drop_linears(self) -> bool:
        """Forget every output of a linear: they are computed again. Whether there were some."""
        dropped = [entry for holder in self._held for entry in holder.drop_linears()]
        self._held.clear()
        self.forget(dropped)
        return bool(dropped)

    def forget(self, dropped: list[Entry]) -> None:
        """Entries that nobody will read."""
        known = set(map(id, dropped))
        self._reads = deque(entry for entry in self._reads if id(entry) not in known)

    def _put(self, value: Tensor, name: str, place: Slot[Tensor], *, alone: bool) -> Entry:
        memory, entry = self._tiers.memory, None
        assert memory is not None
        try:
            entry = _entry(memory, value, name, place, alone=alone)
        finally:
            if entry is None:  # out of memory, a full disk: who goes on after it finds the place free
                memory.allocator.leave(place)
        return entry

    def expect(self, reads: Iterable[Entry]) -> None:
        """The entries that will be read next, in order: the first few are brought to the device from now on."""
        self._reads = deque(reads)
        self._begin_next()

    def read(self, entry: Entry) -> Tensor:
        """An entry's tensor on the device; the reads after it are on their way."""
        value = entry.get()
        # What was expected before it, and passed over, is not expected any more; nothing is, where it was not.
        while self._reads and self._reads.popleft() is not entry:
            pass
        self._begin_next()
        return value

    def _begin_next(self) -> None:
        for entry in islice(self._reads, LOOKAHEAD):
            entry.begin()

    def used_bytes(self) -> dict[str, int]:
        """Bytes in use on each tier, and "pinned": all host memory that is, used or free."""
        memory = self._tiers.memory
        if memory is None:
            return {}
        return {**{tier: memory.allocator.used[tier] for tier in SOON}, "pinned": memory.pinned.nbytes}

    @property
    def pinning_seconds(self) -> float:
        """Time spent on pinning host memory so far."""
        return 0.0 if self._tiers.memory is None else self._tiers.memory.pinned.seconds

    @property
    def plans(self) -> Mapping[tuple[StepSizes, int], PassPlacement]:
        """The plans of passes with a backward pass made so far, by step and by layers that have one."""
        return MappingProxyType(self._tiers.plans)

    def close(self) -> None:
        """Give all memory back: host buffers, files. The next pass starts anew."""
        self._reads.clear()
        self._pass = None
        self._tiers.close()


def _entry(memory: DeviceMemory, value: Tensor, name: str, place: Slot[Tensor], *, alone: bool) -> Entry:
    if place.tier == "device":
        value = value.clone() if alone and value.untyped_storage().nbytes() > place.nbytes else value
        return DeviceEntry(value, place, memory.allocator, name)
    if place.tier == "host":
        return HostEntry(value, place, memory.allocator, memory.transfers)
    assert memory.files is not None
    return DiskTierEntry(value, place, memory.allocator, memory.files)


def _no_room(nbytes: int, allocator: TierAllocator[Tensor]) -> str:
    pool = allocator.pool
    return (
        f"hf_fpdt: no room for {nbytes / GIB:.2f} GiB more of checkpoints: {allocator.used['device'] / GIB:.2f} of "
        f"{allocator.budgets.device / GIB:.2f} GiB are in use on the device, {pool.used_bytes / GIB:.2f} of "
        f"{pool.limit / GIB:.2f} GiB on the host. Passes whose backward pass has not run yet hold theirs: run it, or "
        "raise device_budget_gib, host_budget_gib or disk_dir."
    )


class LayerCheckpoint:
    """What one layer's backward pass needs of its forward pass, by name and chunk; each entry is taken once.

    Attributes:
        keeps_input: whether its forward pass puts "input"; what does not is rebuilt in backward.
        keeps_attention: whether it puts "out" and "lse"; else attention runs again.
    """

    def __init__(self, store: CheckpointStore, model_pass: ModelPass, index: int) -> None:
        self._store, self._pass = store, model_pass
        self.keeps_input = model_pass.plan.kept.inputs[index]
        self.keeps_attention = model_pass.plan.kept.attentions[index]
        self._entries: dict[tuple[str, int], Entry] = {}
        self._unsettled: list[Entry] = []
        self._leaving: list[tuple[tuple[str, int], Tensor, int]] = []
        self._called: set[str] = set()  # linears, for the chunk that runs
        self._linears: dict[str, tuple[LinearBytes, KeptChunks]] = {}
        sizes, kept = model_pass.sizes, model_pass.plan.kept
        for linear, chunks in zip(sizes.linears_of(index), kept.linears_of(index), strict=False):
            if chunks.kept:
                self._linears[linear.name] = linear, chunks

    @property
    def linears(self) -> tuple[LinearBytes, ...]:
        """Those of which some outputs are to be kept, in the order of calls."""
        return tuple(linear for linear, _ in self._linears.values())

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

    def put_linear(self, name: str, chunk: Chunk, value: Tensor) -> None:
        """Keep the output of a linear, if the plan has it and there is room."""
        if name not in self._linears:
            return
        if name in self._called:  # twice for a chunk, other than in the trial: of which call it is nobody could say
            self._store.forget(self.drop_linears(chunk, name))
            return
        self._called.add(name)
        linear, chunks = self._linears[name]
        tier = chunks.tier(chunk.index, len(linear.chunks))
        if tier is None or value.numel() * value.element_size() != linear.chunks[chunk.index]:
            return
        entry = self._store.keep_linear(self, value, f"{name!r} of chunk {chunk.index}", tier)
        if entry is not None:
            self._entries[name, chunk.index] = entry
            self._leaving.append(((name, chunk.index), value, value._version))

    def drop_linears(self, chunk: Chunk | None = None, *names: str) -> list[Entry]:
        """Forget the outputs of linears, of one chunk or of all, of some or of all; the entries that there were."""
        chunks = range(len(self._pass.sizes.inputs)) if chunk is None else (chunk.index,)
        keys = [(name, index) for name in names or self._linears for index in chunks]
        keys = [key for key in keys if key in self._entries]
        dropped = [self._entries.pop(key) for key in keys]
        for entry in dropped:
            entry.free()
        return dropped

    def forget_linears(self, chunk: Chunk) -> None:
        """Nobody will read what linears gave for a chunk."""
        if dropped := self.drop_linears(chunk):
            self._store.forget(dropped)

    def settle(self) -> None:
        """Whatever was put so far may leave the device: the computation waits for copies that still run.

        It waits for those of linears when the next chunk is done. What somebody wrote to is not what a linear gave.
        """
        for entry in self._unsettled:
            entry.settle()
        self._unsettled.clear()
        for key, value, version in self._leaving:
            if value._version != version and key in self._entries:
                self._entries.pop(key).free()
        self._pass.settle([self._entries[key] for key, _, _ in self._leaving if key in self._entries])
        self._leaving = []
        self._called.clear()

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
                f"hf_fpdt: the checkpoint {name!r} of chunk {chunk.index} was used before: FPDT frees what a layer "
                "kept as its backward pass goes, so one forward pass serves one backward pass. Run the forward pass "
                "again."
            )
        return self._store.read(self._entries[name, chunk.index])

    def entries(self, *names: str, chunks: Iterable[Chunk]) -> Iterator[Entry]:
        """The entries of these names that are there, chunk by chunk; for `CheckpointStore.expect`."""
        keys = ((name, chunk.index) for chunk in chunks for name in names)
        yield from (self._entries[key] for key in keys if key in self._entries)

    def expect(self, reads: Iterable[Entry]) -> None:
        """See `CheckpointStore.expect`; a backward pass begins, and copies of its forward pass are waited for."""
        self._pass.settle([])
        self._store.expect(reads)

    def __del__(self) -> None:
        # A graph that never ran backward: its memory goes with it.
        for entry in self._entries.values():
            entry.free()
