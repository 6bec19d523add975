"""A decoder layer as the engine sees it, and one call of it: what its backward pass finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..layout import Chunk, ChunkPlan, Documents
from ..memory import CheckpointStore, KVStore, LayerCheckpoint, ModelPass, WindowedKV
from ..parallel import ChunkDocuments, SequenceParallelGroup
from ..plan import KVBytes, StepSizes, Work, WorkPhase, chunk_work, pass_work, spared_operations
from .layer_state import LayerTraits
from .progress import StepProgress
from .recurrent import StandInCache
from .replay_state import Autocast, OwnWrites, RandomState, modes_of

LayerKV = KVStore | WindowedKV  # K and V of one layer in one pass


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """What the engine knows of one decoder layer; made once, when FPDT is applied.

    Attributes:
        name: the layer, for messages and traces.
        index: its place among the model's layers.
        module: the layer, with its weights.
        raw_forward: the forward of the layer's own class, the module first, hidden states second.
        kernel: name of the attention kernel or "auto".
        store: where K, V and checkpoints go.
        group: the ranks that share the sequence.
        progress: the line that is told of every chunk, if any.
        whole: what makes its weights whole that are kept elsewhere or in another form; it is told the dtype of
            products, the device, and the place of the layer that is entered next, as far as it is known.
        own_writes: what its forward does to its own weights.
    """

    name: str
    index: int
    module: Any
    raw_forward: Callable[..., Any]
    kernel: str
    store: CheckpointStore
    group: SequenceParallelGroup
    progress: StepProgress | None = None
    whole: Callable[[torch.dtype, torch.device, int | None], AbstractContextManager[None]] | None = None
    own_writes: OwnWrites = field(init=False, default_factory=OwnWrites)

    def forward(self, hidden_BSD: Tensor, **arguments: Any) -> Any:
        """The layer's own forward."""
        if not self.own_writes:
            return self.raw_forward(self.module, hidden_BSD, **arguments)
        with self.own_writes.counted():
            return self.raw_forward(self.module, hidden_BSD, **arguments)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards its weights between uses."""
        return hasattr(self.module, "unshard")

    def weights(
        self, dtype: torch.dtype, device: torch.device, then: int | None = None
    ) -> AbstractContextManager[None]:
        """Entered once for all chunks of a pass: inside, weights that are kept elsewhere or in another form are whole.

        Args:
            dtype: of hidden states.
            device: where they are.
            then: the place of the layer that is entered next, as far as it is known.
        """
        if self.whole is None:
            return nullcontext()
        narrow = torch.is_autocast_enabled(device.type) and dtype != torch.float64
        return self.whole(torch.get_autocast_dtype(device.type) if narrow else dtype, device, then)

    @contextmanager
    def gathered_weights(self, dtype: torch.dtype, device: torch.device, then: int | None = None) -> Iterator[None]:
        """The same, beside the layer's own forward and backward pass, for which alone FSDP2 gathers it by itself."""
        if self.is_sharded:
            self.module.unshard()
        try:
            with self.weights(dtype, device, then):
                yield
        finally:
            if self.is_sharded:
                self.module.reshard()


class Aside(Protocol):
    """What a layer says beside its output: one sum over tokens, of what some of its modules give.

    It is differentiable, and its gradient goes into every chunk alike.
    """

    def noted(self) -> AbstractContextManager[list[Tensor]]:
        """Inside, what the modules give is put into the list."""

    def of(self, given: list[Tensor], tokens: slice) -> Tensor | None:
        """The sum over a chunk's tokens; None where there is nothing to say."""


@dataclass
class LayerRun:
    """One call of one layer: what its chunks need, and what its backward pass finds again.

    Attributes:
        layer: which.
        kwargs: its arguments beside hidden states, for the whole sequence.
        step: sizes of the step, with the cut of the sequence.
        kv: which chunks of K and V are resident.
        model_pass: the pass it is of, planned before; None where there is no backward pass.
        window: keys that a query sees, where they are fewer than the sequence's.
        traits: what the layer was seen to do when it was tried.
        full: for progress, whether most of the layer's weights train, not adapters alone.
        aside: what it says beside its output, if anything.
        checkpoint: what its backward pass will need; None where there is none.
        below: the run whose output this one's input is, if it is.
    """

    layer: Layer
    kwargs: Mapping[str, Any]
    step: StepSizes
    kv: KVBytes
    model_pass: ModelPass | None = None
    window: int | None = None
    traits: LayerTraits = LayerTraits()
    full: bool = False
    aside: Aside | None = None
    checkpoint: LayerCheckpoint | None = field(init=False, default=None)
    below: LayerRun | None = field(init=False, default=None)
    random_states: list[RandomState] = field(init=False, default_factory=list)
    stamps: dict[tuple[str, int], Tensor] = field(init=False, default_factory=dict)  # of kept outputs, by chunk
    autocast: Autocast = field(init=False)
    _hidden: tuple[torch.dtype, torch.device] = field(init=False)  # of hidden states
    _modes: tuple[object, ...] = field(init=False, default=())
    _output: tuple[StorageWeakRef, tuple[object, ...]] | None = field(init=False, default=None)
    _versions: tuple[int, ...] = field(init=False, default=())

    @property
    def plan(self) -> ChunkPlan:
        """How the sequence is cut."""
        return self.step.plan

    @property
    def documents(self) -> Documents | None:
        """Of a packed row; None: it is one document."""
        return self.step.documents

    @property
    def index(self) -> int:
        """The layer's place among the model's layers."""
        return self.layer.index

    @property
    def kept(self) -> LayerCheckpoint:
        """The checkpoint of a run with a backward pass."""
        assert self.checkpoint is not None
        return self.checkpoint

    def begin(self, hidden_BSD: Tensor) -> None:
        """Enter the pass, if there is one, after the layer below."""
        self.autocast, self._hidden = Autocast.now(hidden_BSD.device), (hidden_BSD.dtype, hidden_BSD.device)
        if self.model_pass is None:
            return
        self._modes = modes_of(self.layer.module)
        self.checkpoint, below = self.model_pass.enter(self)
        self.below = below if below is not None and below.made(hidden_BSD) else None
        self.checkpoint.keeps_input |= self.below is None
        if below is None and self.layer.progress is not None:
            self.layer.progress.begin(pass_work(self.step, self.model_pass.plan.kept, full=self.full).done)

    def weights(self, *, backward: bool) -> AbstractContextManager[None]:
        """The layer's weights, whole for all chunks of a pass; entered inside of the run's autocast."""
        # Backward begins with the layer that forward ends with.
        after = min(self.index + 1, self.step.model.layers - 1) if self.checkpoint is not None else self.index + 1
        return self.layer.weights(*self._hidden, self._before() if backward else after)

    def gathered_weights(self) -> AbstractContextManager[None]:
        """The same where the layer runs for the sake of the one above it, which is next."""
        return self.layer.gathered_weights(*self._hidden, self.index + 1)

    def _before(self) -> int | None:
        """The layer that is entered after this one in backward: of those below the first whose input is there."""
        below, first = self.below, self.plan.chunks[0]
        while below is not None and not below.kept.holds("input", first) and below.below is not None:
            below = below.below
        return None if below is None else below.index

    def arguments_of(self, chunk: Chunk, cache: StandInCache) -> dict[str, Any]:
        """The layer's arguments beside hidden states for this rank's tokens of a chunk."""
        arguments = {key: tokens_of(value, chunk, self.plan) for key, value in self.kwargs.items()}
        return arguments if self.traits.cache is None else {**arguments, self.traits.cache: cache}

    def cache_of(self, chunk: Chunk, states: Mapping[str, Tensor], *, leaves: bool = False) -> StandInCache:
        """What stands in for a cache in a chunk, before which these states were left."""
        own = self._own(chunk)
        part = self.documents_of(chunk)
        return StandInCache(own.start, states, leaves=leaves, group=self.layer.group, part=part)

    @property
    def one_by_one(self) -> Documents | None:
        """The documents of a packed row, where the layer runs on each by itself, since it has states to begin anew."""
        return self.documents if self.state_names and self.traits.by_documents in (None, "layer") else None

    def documents_of(self, chunk: Chunk) -> ChunkDocuments | None:
        """The documents of a chunk of a packed row, where a layer that asks for its cache runs on them at once."""
        if self.documents is None or self.traits.by_documents in (None, "layer"):
            return None
        return ChunkDocuments(self.documents, range(chunk.start, chunk.stop), self._own(chunk))

    def _own(self, chunk: Chunk) -> range:
        """This rank's tokens of a chunk."""
        tokens = (chunk.stop - chunk.start) // self.plan.sp_size
        start = chunk.start + self.layer.group.rank * tokens
        return range(start, start + tokens)

    @property
    def state_names(self) -> list[str]:
        """Names of the checkpoints of states."""
        return [state.name for state in self.traits.states]

    def noting(self) -> AbstractContextManager[list[Tensor]]:
        """Around the layer's own forward on a chunk whose part of the sum aside is wanted."""
        return nullcontext([]) if self.aside is None else self.aside.noted()

    def sum_aside(self, given: list[Tensor], chunk: Chunk) -> Tensor | None:
        """A chunk's part of it."""
        return None if self.aside is None else self.aside.of(given, chunk.rank_slice)

    def end(self, output_BSD: Tensor) -> None:
        """Remember which tensor the output was, without keeping it."""
        if self.checkpoint is not None:
            self._output = StorageWeakRef(output_BSD.untyped_storage()), _reading(output_BSD)

    def watched(self, parameters: Sequence[Tensor], before: Sequence[int]) -> list[Tensor]:
        """Which weights autograd is to watch from now on; `check_unchanged` looks at the others.

        Args:
            before: the weights' versions when the forward pass began.
        """
        own = self.layer.own_writes
        own.find(parameters, before)
        self._versions = own.versions()
        return own.others(parameters)

    def made(self, hidden_BSD: Tensor) -> bool:
        """Whether `hidden_BSD` is this layer's output, untouched; then running the layer again gives it again."""
        return self._output == (StorageWeakRef(hidden_BSD.untyped_storage()), _reading(hidden_BSD))

    def check_unchanged(self, parameters: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless the layer would compute in backward what it computed in forward with these."""
        layer = self.layer
        # In whatever order: PEFT takes experts that it adapts out of their module and puts them back, last.
        if {id(p) for p in layer.module.parameters()} != {id(p) for p in parameters}:
            raise RuntimeError(
                f"hf_fpdt: {layer.name} has other weights now than in forward (torch.func.functional_call?), and "
                "backward runs it again: call backward while they are in place, or copy their values into its "
                "parameters."
            )
        if modes_of(layer.module) != self._modes:
            raise RuntimeError(
                f"hf_fpdt: adapters or training mode of {layer.name} changed between forward and backward, which runs "
                "the layer again: call backward first (inside of disable_adapter(), before set_adapter() or eval())."
            )
        # Of weights that were found since, this run has no count, and autograd watches them.
        if layer.own_writes.versions()[: len(self._versions)] != self._versions:
            raise RuntimeError(
                f"hf_fpdt: a weight of {layer.name} was modified by an inplace operation between forward and "
                "backward, which runs the layer again: call backward first, then change weights (optimizer, merging)."
            )

    def advance(self, phase: WorkPhase, chunk: Chunk, *, attends: bool = True) -> None:
        """One chunk of a pass with a backward pass was handed to the device; see `plan.chunk_work`."""
        if self.layer.progress is not None and self.model_pass is not None:
            mix, layer = self.step.model.mix(self.index), self.index - self.model_pass.first_layer
            work = chunk_work(self.step, chunk, phase, attends=attends, full=self.full, window=self.window, mix=mix)
            if phase != "forward":
                work += Work(-spared_operations(self.step, self.model_pass.plan.kept, layer, chunk))
            what = f"{phase} layer {self.index + 1}/{self.step.model.layers}"
            what += f" chunk {chunk.index + 1}/{len(self.plan.chunks)}"
            self.layer.progress.advance(work.done, work.strict, what)

    def kv_store(self, device: torch.device, *, backward: bool) -> LayerKV:
        """An empty store for K and V of one pass."""
        if self.window is not None:
            return WindowedKV(self.plan, self.window, self.documents)
        resident = self.kv.backward_resident if backward else self.kv.forward_resident
        return KVStore(self.plan, resident, self.layer.store.host_memory(device), self.documents)


def tokens_of(value: Any, chunk: Chunk, plan: ChunkPlan) -> Any:
    """The chunk's part of one layer argument: tensors with a token axis (dimension 1, or the only one) are sliced."""
    own = chunk.rank_slice
    return along_tokens(value, plan.n_tokens // plan.sp_size, lambda part, axis: part[:, own] if axis else part[own])


def along_tokens(value: Any, tokens: int, change: Callable[[Tensor, int], Tensor]) -> Any:
    """Arguments of a layer, changed where they have a token axis: `change` gets each with its axis."""
    if isinstance(value, Mapping):
        return {name: along_tokens(item, tokens, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(along_tokens(item, tokens, change) for item in value)
    axis = min(1, value.dim() - 1) if isinstance(value, Tensor) and value.dim() else None
    return value if axis is None or value.shape[axis] != tokens else change(value, axis)


def _reading(value: Tensor) -> tuple[object, ...]:
    """How a tensor reads its memory, and how often that was written: another view of it is another value."""
    return value._version, value.dtype, value.shape, value.stride(), value.storage_offset()
