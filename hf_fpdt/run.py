"""One call of one layer, and what its attention does in each pass (paper sections 4.1 and 4.2).

The registered attention function is called inside the layer's own forward, on one chunk; which of the calls below it
finds there decides what it does: `AttentionCall` in a forward pass, `CaptureCall`, `ReplayCall` and `RebuildCall` in a
backward pass. See `layer` for how they follow one another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .ambient import Autocast, RandomState
from .attention import backward_row, forward_row, kernel_spans
from .checkpoint_store import CheckpointStore, LayerCheckpoint
from .comms import SequenceParallelGroup, repeat_heads, sum_repeated_heads
from .kernels import Kernel, select_kernel
from .kv_store import KVStore
from .layout import Chunk, ChunkPlan, Span
from .memory import StepSizes
from .progress import StepProgress
from .work import WorkPhase, chunk_work, pass_work

# Keys of one backward call at most: a kernel's own dK, dV and fp32 sums are as long as its keys, and must not grow
# with the sequence.
BACKWARD_CALL_TOKENS = 131_072


class Call:
    """What the registered attention function does inside a layer's forward.

    Attributes:
        unread: of "q", "k", "v" and "rest" (what the layer computes after attention) those whose values nobody reads.
        n_tokens: of the whole sequence, where the attention function sees a part of it.
    """

    unread: frozenset[str] = frozenset()
    n_tokens: int | None = None

    def attend(self, q_BSNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, *, scale: float) -> Tensor:
        """Attention output [B, S, N, H] for the rank's own tokens of the chunk."""
        raise NotImplementedError


_current_call: ContextVar[Call | None] = ContextVar("fpdt_attention_call", default=None)


def current_call() -> Call | None:
    """What the attention function is to do inside the chunk that runs now; None outside of one."""
    return _current_call.get()


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Inside, the attention function finds `call`."""
    token = _current_call.set(call)
    try:
        yield
    finally:
        _current_call.reset(token)


def hidden_states_of(output: Any) -> Tensor:
    """A layer's output, which must be hidden states alone."""
    if not isinstance(output, Tensor):
        raise NotImplementedError(f"it returns {type(output).__name__}, not hidden states alone")
    return output


class AttentionReached(BaseException):
    """Ends a layer's forward once k and v are known; BaseException, so that no handler of the model catches it."""


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
                f"fpdt: {self.name} has other weights now than in forward (torch.func.functional_call?), and backward "
                "runs it again: call backward while they are in place, or copy their values into its parameters."
            )
        if self.modes() != self._modes:
            raise RuntimeError(
                f"fpdt: adapters or training mode of {self.name} changed between forward and backward, which runs the "
                "layer again: call backward first (inside of disable_adapter(), before set_adapter() or eval())."
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


def tokens_of(value: Any, chunk: Chunk, plan: ChunkPlan) -> Any:
    """The chunk's part of one layer argument: tensors with a token axis (dimension 1, or the only one) are sliced."""
    if isinstance(value, (tuple, list)):
        return type(value)(tokens_of(item, chunk, plan) for item in value)
    n_tokens = plan.n_tokens // plan.sp_size
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[min(1, value.dim() - 1)] != n_tokens:
        return value
    return value[chunk.rank_slice] if value.dim() == 1 else value[:, chunk.rank_slice]


class AttentionCall(Call):
    """The attention of one chunk inside one layer; `attend` is called by the registered function.

    A rank's own tokens and all heads go in and out; between the exchanges it holds the whole chunk for its heads.

    Attributes:
        qkv: q, k, v of the rank's tokens as the layer made them, with their graph in a replay.
        q: the chunk's queries for this rank's heads.
    """

    qkv: tuple[Tensor, Tensor, Tensor] | None = None
    q: Tensor
    scale: float

    def __init__(self, run: LayerRun, chunk: Chunk, store: KVStore) -> None:
        self.run, self.chunk, self.store, self.n_tokens = run, chunk, store, run.plan.n_tokens

    def attend(self, q_BSNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, *, scale: float) -> Tensor:
        """Attention output [B, S, N, H] for the rank's own tokens of the chunk."""
        if self.qkv is not None:
            raise RuntimeError(f"fpdt: {self.run.name} calls its attention function twice; it is not supported.")
        self.qkv, self.scale = (q_BSNH, k_BSGH, v_BSGH), scale
        self.repeats = self.run.group.kv_repeats(q_BSNH.shape[2], k_BSGH.shape[2])
        with torch.no_grad():
            q, *kv = q_BSNH.detach(), *(repeat_heads(x.detach(), self.repeats) for x in (k_BSGH, v_BSGH))
            return self._attend(q, *kv)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Forward: this chunk's queries read every key so far."""
        self._exchange(q, k, v)
        row = self.row_forward()
        if self.run.checkpoint is not None and self.run.checkpoint.keeps_attention:
            self._keep(row)
        return self.run.group.heads_to_seq(row[0])[0]

    def _keep(self, row: tuple[Tensor, Tensor], *, rebuilt: bool = False) -> None:
        for name, part in zip(("out", "lse"), row, strict=True):
            self.run.kept.put(name, self.chunk, part, rebuilt=rebuilt)

    def _exchange(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pieces for heads; k and v go into the store."""
        self.q, *kv = self.run.group.seq_to_heads(q, k, v)
        self.store.put(self.chunk, *kv)

    def row_forward(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of this chunk's queries over the chunks 0..i of the store."""
        kernel, spans = self._calls()
        return forward_row(kernel, self.q, self.store.stream(spans), scale=self.scale)

    def row_backward(self, d_leaf_BSNH: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv for the rank's own tokens of this chunk, complete if every later chunk's row was done before."""
        kernel, spans = self._calls(BACKWARD_CALL_TOKENS)
        (dout,) = self.run.group.seq_to_heads(d_leaf_BSNH)
        dq = backward_row(kernel, dout, self.q, row, self.store, spans, scale=self.scale)
        dq, dk, dv = self.run.group.heads_to_seq(dq, *self.store.take_grad(self.chunk))
        return dq, sum_repeated_heads(dk, self.repeats), sum_repeated_heads(dv, self.repeats)

    def _calls(self, most_tokens: int = 2**62) -> tuple[Kernel, Sequence[Span]]:
        kernel = select_kernel(self.run.kernel, self.q.device, self.q.dtype, self.q.shape[-1])
        diagonal, unit = (self.chunk.start, self.chunk.stop), self.run.plan.chunk_tokens
        return kernel, kernel_spans(kernel, diagonal, unit, self.store, most_tokens=most_tokens)


class CaptureCall(AttentionCall):
    unread = frozenset({"q"})

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store.put(self.chunk, *self.run.group.seq_to_heads(k, v))
        raise AttentionReached


class RebuildCall(AttentionCall):
    """Forward again, for the sake of the layer's output; attention runs again only where its output was not kept."""

    def __init__(self, run: LayerRun, chunk: Chunk, store: KVStore) -> None:
        super().__init__(run, chunk, store)
        if run.kept.holds("out", chunk):
            self.unread = frozenset({"q", "k", "v"})

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.run.kept.holds("out", self.chunk):
            return self.run.group.heads_to_seq(self.run.kept.peek("out", self.chunk))[0]
        self._exchange(q, k, v)
        row = self.row_forward()
        self._keep(row, rebuilt=True)
        return self.run.group.heads_to_seq(row[0])[0]


class ReplayCall(AttentionCall):
    """`leaf` is what the layer's forward saw as attention output; `row` is (out, lse) for this rank's heads."""

    leaf: Tensor
    row: tuple[Tensor, Tensor]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.store.holds(self.chunk):
            (self.q,) = self.run.group.seq_to_heads(q)
        else:
            self._exchange(q, k, v)
        kept, chunk = self.run.kept, self.chunk
        self.row = (
            (kept.take("out", chunk), kept.take("lse", chunk)) if kept.holds("out", chunk) else self.row_forward()
        )
        self.leaf = self.run.group.heads_to_seq(self.row[0])[0].detach().requires_grad_()
        self.unread = frozenset({"rest"})  # y is wanted for its graph alone
        return self.leaf
