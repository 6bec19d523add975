"""The layer executor: a decoder layer run chunk by chunk, for any architecture (paper sections 4.1 and 4.2).

Everything in a decoder layer but attention acts on each token alone, and attention reaches the registered function as
finished q, k, v. So the model's OWN layer forward is called on one chunk of hidden states at a time, and `attend`
below does the sequence-wide part. Its role depends on the pass:

    forward   k, v into the store; the chunk's queries read chunks 0..i; out and lse may be kept
    capture   k, v into the store again, and the layer's forward ends there (backward pass, token-local, cheap)
    replay    the layer runs with grad; q, k, v keep their graph, and the caller gets a LEAF that holds the output

Backward goes through the chunks in DESCENDING order. Row i completes dq_i, and also dk_i, dv_i, because only rows ≥ i
read chunk i; so each chunk is replayed once and only K, V, dK, dV outlive a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import record_function

from .ambient import Autocast, RandomState, untouched_random_state
from .attention import backward_row, forward_row, kernel_spans
from .checkpoint_store import CheckpointStore, LayerCheckpoint
from .comms import SequenceParallelGroup, repeat_heads, sum_repeated_heads
from .gradients import GradientSums
from .kernels import Kernel, select_kernel
from .kv_store import KVStore
from .layout import Chunk, ChunkPlan, Span
from .memory import StepSizes

# Keys of one backward call at most: a kernel's own dK, dV and fp32 sums are as long as its keys, and must not grow
# with the sequence.
BACKWARD_CALL_TOKENS = 131_072

_current_call: ContextVar[AttentionCall | None] = ContextVar("fpdt_attention_call", default=None)


def current_call() -> AttentionCall | None:
    """What the attention function is to do inside the chunk that runs now; None outside of one."""
    return _current_call.get()


@contextmanager
def _calling(call: AttentionCall) -> Iterator[None]:
    token = _current_call.set(call)
    try:
        yield
    finally:
        _current_call.reset(token)
    if call.qkv is None:
        raise RuntimeError(
            f"fpdt: {call.run.name} never called its attention function, so it was not exact to cut it in chunks; "
            "models whose layers attend in another way are not supported."
        )


class _AttentionReached(BaseException):
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
        sharded: whether FSDP2 shards them between uses.
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
    sharded: bool
    checkpoint: LayerCheckpoint | None = field(init=False, default=None)
    below: LayerRun | None = field(init=False, default=None)
    random_states: list[RandomState] = field(init=False, default_factory=list)
    autocast: Autocast = field(init=False)
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
            self.checkpoint, below = self.store.join(self, hidden_BSD.device)
            self.below = below if below is not None and below.made(hidden_BSD) else None
            self.checkpoint.keeps_input |= self.below is None

    def end(self, output_BSD: Tensor) -> None:
        """Remember which tensor the output was, without keeping it."""
        if self.checkpoint is not None:
            self._output = StorageWeakRef(output_BSD.untyped_storage()), _reading(output_BSD)

    def made(self, hidden_BSD: Tensor) -> bool:
        """Whether `hidden_BSD` is this layer's output, untouched; then running the layer again gives it again."""
        return self._output == (StorageWeakRef(hidden_BSD.untyped_storage()), _reading(hidden_BSD))

    def kv_store(self, device: torch.device, *, backward: bool) -> KVStore:
        """An empty store for K and V of one pass."""
        kv = self.store.kv_plan(self, device)
        resident = kv.backward_resident if backward else kv.forward_resident
        return KVStore(self.plan, resident, self.store.room(device))

    def on_chunk(self, chunk: Chunk, x_BSD: Tensor, call: AttentionCall) -> Tensor:
        """The layer's own forward on one chunk."""
        kwargs = {key: tokens_of(value, chunk, self.plan) for key, value in self.kwargs.items()}
        with _calling(call):
            y_BSD = self.forward(x_BSD, **kwargs)
        if not isinstance(y_BSD, Tensor):
            raise NotImplementedError(
                f"fpdt: {self.name} returns {type(y_BSD).__name__}, not hidden states alone; it is not supported."
            )
        return y_BSD


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


class AttentionCall:
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
        self.run, self.chunk, self.store = run, chunk, store

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


class _CaptureCall(AttentionCall):
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store.put(self.chunk, *self.run.group.seq_to_heads(k, v))
        raise _AttentionReached


class _RebuildCall(AttentionCall):
    """Forward again, for the sake of the layer's output; attention runs again only where its output was not kept."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.run.kept.holds("out", self.chunk):
            return self.run.group.heads_to_seq(self.run.kept.peek("out", self.chunk))[0]
        self._exchange(q, k, v)
        row = self.row_forward()
        self._keep(row, rebuilt=True)
        return self.run.group.heads_to_seq(row[0])[0]


class _ReplayCall(AttentionCall):
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
        return self.leaf


def run_layer(run: LayerRun, hidden_BSD: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The layer's output for the whole sequence, [B, S, D], differentiable in `hidden_BSD` and `parameters`."""
    wants_grad = hidden_BSD.requires_grad or any(p.requires_grad for p in parameters)
    run.begin(hidden_BSD, differentiable=torch.is_grad_enabled() and wants_grad)
    output_BSD: Tensor = _ChunkedLayer.apply(run, hidden_BSD, *parameters)
    run.end(output_BSD)
    return output_BSD


class _ChunkedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: LayerRun, hidden: Tensor, *parameters: Tensor) -> Tensor:
        output: Tensor | None = None
        with (
            record_function(f"fpdt::forward {run.name}"),
            run.autocast.again(),
            run.kv_store(hidden.device, backward=False) as store,
        ):
            for chunk in run.plan.chunks:
                x = hidden[:, chunk.rank_slice]
                _keep_input(run, chunk, x)
                y = run.on_chunk(chunk, x, AttentionCall(run, chunk, store))
                output = y.new_empty(*hidden.shape[:2], y.shape[2]) if output is None else output
                output[:, chunk.rank_slice] = y
                if run.checkpoint is not None:
                    run.checkpoint.settle()
        assert output is not None
        ctx.run, ctx.hidden_dtype = run, hidden.dtype
        ctx.save_for_backward(*parameters)  # autograd then refuses weights that were changed before backward
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        run, parameters = ctx.run, ctx.saved_tensors
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        sums = GradientSums(wanted)
        with record_function(f"fpdt::backward {run.name}"), untouched_random_state(d_output.device):
            _rebuild_input(run, d_output.device)
            d_hidden = torch.zeros_like(d_output, dtype=ctx.hidden_dtype) if ctx.needs_input_grad[1] else None
            _expect_backward(run)
            with torch.enable_grad(), run.kv_store(d_output.device, backward=True) as store:
                _capture_kv(run, store)
                with run.autocast.again():
                    for chunk in reversed(run.plan.chunks):
                        dx = None if d_hidden is None else d_hidden[:, chunk.rank_slice]
                        _backward_chunk(run, chunk, store, d_output[:, chunk.rank_slice], dx, sums)
        grads = sums.totals()
        return None, d_hidden, *(grads.get(id(p)) for p in parameters)


def _keep_input(run: LayerRun, chunk: Chunk, x: Tensor) -> None:
    if run.checkpoint is None:
        return
    run.random_states.append(RandomState.now(x.device))
    if run.checkpoint.keeps_input:
        run.checkpoint.put("input", chunk, x)


def _rebuild_input(run: LayerRun, device: torch.device) -> None:
    """Make the layer's missing input again: the layers below it run forward, from the nearest kept input up."""
    first = run.plan.chunks[0]
    chain = [run]  # from the layer itself down to the one whose input is there
    while not chain[-1].kept.holds("input", first):
        below = chain[-1].below
        if below is None:
            return  # used before; taking it says so
        chain.append(below)
    for lower, upper in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
        with record_function(f"fpdt::rebuild {lower.name}"), lower.weights():
            _forward_again(lower, upper, device)


def _forward_again(lower: LayerRun, upper: LayerRun, device: torch.device) -> None:
    """Keep the output of `lower` as the input of `upper`, as the forward pass would have."""
    chunks = lower.plan.chunks
    lower.kept.expect(lower.kept.entries("input", "out", chunks=chunks))
    with torch.no_grad(), lower.autocast.again(), lower.kv_store(device, backward=False) as store:
        for chunk in chunks:
            lower.random_states[chunk.index].restore()
            x = lower.kept.peek("input", chunk)
            upper.kept.put("input", chunk, lower.on_chunk(chunk, x, _RebuildCall(lower, chunk, store)), rebuilt=True)
            lower.kept.settle()
            upper.kept.settle()


def _expect_backward(run: LayerRun) -> None:
    """Tell the store what this layer's backward pass reads, and with what the layer below begins."""
    *earlier, last = run.plan.chunks
    reads = [*run.kept.entries("input", chunks=earlier)]
    reads += run.kept.entries("input", "out", "lse", chunks=(last, *reversed(earlier)))
    below = run.below
    while below is not None and not below.kept.holds("input", last):
        below = below.below
    if below is not None:
        reads += below.kept.entries("input", chunks=run.plan.chunks)
    run.kept.expect(reads)


def _capture_kv(run: LayerRun, store: KVStore) -> None:
    """K, V of every chunk but the last, made again from the inputs; the last chunk's replay brings its own."""
    with torch.no_grad(), run.autocast.again():
        for chunk in run.plan.chunks[:-1]:
            run.random_states[chunk.index].restore()
            with suppress(_AttentionReached):
                run.on_chunk(chunk, run.kept.peek("input", chunk), _CaptureCall(run, chunk, store))


def _backward_chunk(
    run: LayerRun, chunk: Chunk, store: KVStore, dy: Tensor, dx: Tensor | None, sums: GradientSums
) -> None:
    """Backward of one chunk, later chunks done: writes the input's gradient to `dx` and adds parameters' to `sums`."""
    run.random_states[chunk.index].restore()
    x = run.kept.take("input", chunk).detach().requires_grad_(dx is not None)
    call = _ReplayCall(run, chunk, store)
    y = run.on_chunk(chunk, x, call)
    inputs = [] if dx is None else [x]

    # out-projection, MLP, residual. Some layers share nodes between this part and q, k, v, so the graph is kept; it
    # goes with y, and the MLP's activations are gone before attention runs.
    *dx_parts, d_leaf = sums.differentiate([y], [dy], [*inputs, call.leaf], retain_graph=True)
    del y

    qkv = call.qkv
    assert qkv is not None
    differentiable = [t.requires_grad for t in qkv]
    if d_leaf is not None and any(differentiable):
        d_qkv = compress(call.row_backward(d_leaf, call.row), differentiable)
        dx_parts += sums.differentiate(list(compress(qkv, differentiable)), list(d_qkv), inputs)
    if dx is not None:
        for part in dx_parts:
            dx.add_(part) if part is not None else None
