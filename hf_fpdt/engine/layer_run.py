"""One call of one layer: what every chunk of it needs, and what its backward pass finds again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..layout import Chunk, ChunkPlan
from ..memory import CheckpointStore, KVStore, LayerCheckpoint
from ..parallel import SequenceParallelGroup
from ..plan import StepSizes, WorkPhase, chunk_work, pass_work
from .progress import StepProgress
from .replay_state import Autocast, RandomState


@dataclass
class LayerRun:
    """One call of one layer: what every chunk of it needs.

    Attributes:
        name: the layer, for messages and traces.
        index: its place among the model's layers.
        forward: the layer's own forward, hidden states first.
        kwargs: its other arguments, for the whole sequence.
        step: sizes of the step, with the cut of the sequence.
        kernel: name of the attention kernel or "auto".
        store: where K, V and checkpoints go.
        group: the ranks that share the sequence.
        weights: makes the layer's weights whole while it is entered.
        modes: those of the layer's modules now.
        parameters: its parameters now.
        sharded: whether FSDP2 shards them between uses.
        progress: the line that is told of every chunk, if any.
        full: for progress, whether most of the layer's weights train, not adapters alone.
        checkpoint: what its backward pass will need; None where there is none.
        below: the run whose output this one's input is, if it is.
    """

    name: str
    index: int
    forward: Callable[..., Any]
    kwargs: Mapping[str, Any]
    step: StepSizes
    kernel: str
    store: CheckpointStore
    group: SequenceParallelGroup
    weights: Callable[[], AbstractContextManager[None]]
    modes: Callable[[], tuple[object, ...]]
    parameters: Callable[[], Iterable[Tensor]]
    sharded: bool
    progress: StepProgress | None = None
    full: bool = False
    checkpoint: LayerCheckpoint | None = field(init=False, default=None)
    below: LayerRun | None = field(init=False, default=None)
    random_states: list[RandomState] = field(init=False, default_factory=list)
    autocast: Autocast = field(init=False)
    _modes: tuple[object, ...] = field(init=False, default=())
    _output: tuple[StorageWeakRef, tuple[object, ...]] | None = field(init=False, default=None)

    @property
    def plan(self) -> ChunkPlan:
        """How the sequence is cut."""
        return self.step.plan

    @property
    def kept(self) -> LayerCheckpoint:
        """The checkpoint of a run with a backward pass."""
        assert self.checkpoint is not None
        return self.checkpoint

    def begin(self, hidden_BSD: Tensor, *, differentiable: bool) -> None:
        """Join the pass of the layer below, or start one."""
        self.autocast = Autocast.now(hidden_BSD.device)
        if differentiable:
            self._modes = self.modes()
            self.checkpoint, below = self.store.join(self, hidden_BSD.device)
            self.below = below if below is not None and below.made(hidden_BSD) else None
            self.checkpoint.keeps_input |= self.below is None
            if below is None and self.progress is not None:
                self.progress.begin(pass_work(self.step, self.checkpoint.plan.kept, full=self.full).done)

    def end(self, output_BSD: Tensor) -> None:
        """Remember which tensor the output was, without keeping it."""
        if self.checkpoint is not None:
            self._output = StorageWeakRef(output_BSD.untyped_storage()), _reading(output_BSD)

    def made(self, hidden_BSD: Tensor) -> bool:
        """Whether `hidden_BSD` is this layer's output, untouched; then running the layer again gives it again."""
        return self._output == (StorageWeakRef(hidden_BSD.untyped_storage()), _reading(hidden_BSD))

    def check_unchanged(self, parameters: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the layer would compute in backward what it computed in forward with these."""
        if not all(map(operator.is_, self.parameters(), parameters)):
            raise RuntimeError(
                f"hf_fpdt: {self.name} has other weights now than in forward (torch.func.functional_call?), and "
                "backward runs it again: call backward while they are in place, or copy their values into its "
                "parameters."
            )
        if self.modes() != self._modes:
            raise RuntimeError(
                f"hf_fpdt: adapters or training mode of {self.name} changed between forward and backward, which runs "
                "the layer again: call backward first (inside of disable_adapter(), before set_adapter() or eval())."
            )

    def advance(self, phase: WorkPhase, chunk: Chunk, *, attends: bool = True) -> None:
        """One chunk of a pass with a backward pass was handed to the device; see `work.chunk_work`."""
        if self.progress is not None and self.checkpoint is not None:
            work = chunk_work(self.step, chunk, phase, attends=attends, full=self.full)
            what = f"{phase} layer {self.index + 1}/{self.step.model.layers}"
            what += f" chunk {chunk.index + 1}/{len(self.plan.chunks)}"
            self.progress.advance(work.done, work.strict, what)

    def kv_store(self, device: torch.device, *, backward: bool) -> KVStore:
        """An empty store for K and V of one pass."""
        kv = self.store.kv_plan(self, device)
        resident = kv.backward_resident if backward else kv.forward_resident
        return KVStore(self.plan, resident, self.store.room(device))


def _reading(value: Tensor) -> tuple[object, ...]:
    """How a tensor reads its memory, and how often that was written: another view of it is another value."""
    return value._version, value.dtype, value.shape, value.stride(), value.storage_offset()
