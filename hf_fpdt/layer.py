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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ambient import Autocast, RandomState, untouched_random_state
from .attention import backward_row, forward_row, kernel_spans
from .comms import SequenceParallelGroup, repeat_heads, sum_repeated_heads
from .kernels import Kernel, select_kernel
from .layout import Chunk, ChunkPlan, Span
from .offload import KVStore, LayerCheckpoint, accumulation_dtype

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
        name: the layer, for messages.
        forward: the layer's own forward, hidden states first.
        kwargs: its other arguments, for the whole sequence.
        plan: how the sequence is cut.
        kernel: name of the attention kernel or "auto".
        keep_attention: whether backward finds attention's out and lse ("attention") or runs it again ("input").
    """

    name: str
    forward: Callable[..., Any]
    kwargs: Mapping[str, Any]
    plan: ChunkPlan
    kernel: str
    keep_attention: bool
    checkpoint: LayerCheckpoint
    group: SequenceParallelGroup
    random_states: list[RandomState] = field(default_factory=list)
    autocast: Autocast = field(init=False)
    differentiable: bool = field(init=False, default=False)

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
        if self.run.keep_attention and self.run.differentiable:
            for name, part in zip(("out", "lse"), row, strict=True):
                self.run.checkpoint.put(name, self.chunk, part)
        return self.run.group.heads_to_seq(row[0])[0]

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
        kernel, spans = self._calls()
        (dout,) = self.run.group.seq_to_heads(d_leaf_BSNH)
        dq = backward_row(kernel, dout, self.q, row, self.store, spans, scale=self.scale)
        dq, dk, dv = self.run.group.heads_to_seq(dq, *self.store.take_grad(self.chunk))
        return dq, sum_repeated_heads(dk, self.repeats), sum_repeated_heads(dv, self.repeats)

    def _calls(self) -> tuple[Kernel, Sequence[Span]]:
        kernel = select_kernel(self.run.kernel, self.q.device, self.q.dtype, self.q.shape[-1])
        heads = self.store.kv_shape
        return kernel, kernel_spans(kernel, self.chunk.start, self.chunk.stop, self.run.plan.chunk_tokens, heads)


class _CaptureCall(AttentionCall):
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store.put(self.chunk, *self.run.group.seq_to_heads(k, v))
        raise _AttentionReached


class _ReplayCall(AttentionCall):
    """`leaf` is what the layer's forward saw as attention output; `row` is (out, lse) for this rank's heads."""

    leaf: Tensor
    row: tuple[Tensor, Tensor]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.store.holds(self.chunk):
            (self.q,) = self.run.group.seq_to_heads(q)
        else:
            self._exchange(q, k, v)
        kept, chunk = self.run.checkpoint, self.chunk
        self.row = (
            (kept.take("out", chunk), kept.take("lse", chunk)) if kept.holds("out", chunk) else self.row_forward()
        )
        self.leaf = self.run.group.heads_to_seq(self.row[0])[0].detach().requires_grad_()
        return self.leaf


def run_layer(run: LayerRun, hidden_BSD: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The layer's output for the whole sequence, [B, S, D], differentiable in `hidden_BSD` and `parameters`."""
    wants_grad = hidden_BSD.requires_grad or any(p.requires_grad for p in parameters)
    run.differentiable = torch.is_grad_enabled() and wants_grad
    run.autocast = Autocast.now(hidden_BSD.device)
    return _ChunkedLayer.apply(run, hidden_BSD, *parameters)


class _ChunkedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: LayerRun, hidden: Tensor, *parameters: Tensor) -> Tensor:
        output: Tensor | None = None
        store = KVStore(run.plan)
        with run.autocast.again():
            for chunk in run.plan.chunks:
                x = hidden[:, chunk.rank_slice]
                if run.differentiable:
                    run.random_states.append(RandomState.now(hidden.device))
                    run.checkpoint.put("input", chunk, x)
                y = run.on_chunk(chunk, x, AttentionCall(run, chunk, store))
                output = y.new_empty(*hidden.shape[:2], y.shape[2]) if output is None else output
                output[:, chunk.rank_slice] = y
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
        d_hidden = torch.zeros_like(d_output, dtype=ctx.hidden_dtype) if ctx.needs_input_grad[1] else None
        with untouched_random_state(d_output.device), torch.enable_grad():
            store = _captured_kv(run)
            with run.autocast.again():
                for chunk in reversed(run.plan.chunks):
                    dx = None if d_hidden is None else d_hidden[:, chunk.rank_slice]
                    _backward_chunk(run, chunk, store, d_output[:, chunk.rank_slice], dx, sums)
        grads = sums.totals()
        return None, d_hidden, *(grads.get(id(p)) for p in parameters)


def _captured_kv(run: LayerRun) -> KVStore:
    """K, V of every chunk but the last, made again from the kept inputs; the last chunk's replay brings its own."""
    store = KVStore(run.plan)
    with torch.no_grad(), run.autocast.again():
        for chunk in run.plan.chunks[:-1]:
            run.random_states[chunk.index].restore()
            with suppress(_AttentionReached):
                run.on_chunk(chunk, run.checkpoint.peek("input", chunk), _CaptureCall(run, chunk, store))
    return store


def _backward_chunk(
    run: LayerRun, chunk: Chunk, store: KVStore, dy: Tensor, dx: Tensor | None, sums: GradientSums
) -> None:
    """Backward of one chunk, later chunks done: writes the input's gradient to `dx` and adds parameters' to `sums`."""
    run.random_states[chunk.index].restore()
    x = run.checkpoint.take("input", chunk).detach().requires_grad_(dx is not None)
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


@contextmanager
def _hooks_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of `Tensor.register_hook` see the whole gradient when autograd receives it, not that of each chunk too."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


class GradientSums:
    """Parameter gradients of one layer, added up over its chunks in fp32 (float64 for float64)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[int, Tensor] = {}
        self._own: set[int] = set()  # sums nobody else holds: autograd may hand out a gradient that is shared

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        d_outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """Gradients of `inputs` (None where unused); those of the parameters are added to the sums."""
        with _hooks_aside(self._parameters):
            grads = torch.autograd.grad(
                outputs, [*inputs, *self._parameters], d_outputs, retain_graph=retain_graph, allow_unused=True
            )
        for parameter, grad in zip(self._parameters, grads[len(inputs) :], strict=True):
            if grad is not None:
                self._add(id(parameter), grad)
        return list(grads[: len(inputs)])

    def _add(self, key: int, grad: Tensor) -> None:
        total = self._sums.get(key)
        wide = accumulation_dtype(grad.dtype)
        if total is None:
            self._sums[key] = grad.to(wide)
            if grad.dtype != wide:
                self._own.add(key)
        elif key in self._own:
            total.add_(grad)
        else:
            self._sums[key] = total + grad
            self._own.add(key)

    def totals(self, factor: Tensor | None = None) -> dict[int, Tensor]:
        """Gradient by id of its parameter, times `factor`, rounded once to the parameter's dtype.

        Parameters that no chunk used are absent.
        """
        scaled = {key: total if factor is None else total * factor for key, total in self._sums.items()}
        return {id(p): scaled[id(p)].to(p.dtype) for p in self._parameters if id(p) in scaled}
