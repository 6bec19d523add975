"""What the registered attention function does inside a layer's own forward (paper sections 4.1 and 4.2).

It is called on one chunk; which of the calls below it finds there decides what it does: `AttentionCall` in a forward
pass, `CaptureCall`, `ReplayCall` and `RebuildCall` in a backward pass. See `layer` for how they follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..attention import (
    AttentionSpec,
    Kernel,
    backward_row,
    forward_row,
    row_calls,
    select_kernel,
    sinks_gradient,
)
from ..layout import Chunk, Documents, Span
from ..parallel import repeat_heads, sum_repeated_heads
from ..plan import AttentionSizes
from .layer_run import LayerKV, LayerRun
from .layer_state import Asked

# Keys of one backward call at most: a kernel's own dK, dV and fp32 sums are as long as its keys, and must not grow
# with the sequence.
BACKWARD_CALL_TOKENS = 131_072


class Call:
    """What the registered attention function does inside a layer's forward.

    Attributes:
        layer: its place among the model's; None: none that is trained.
        unread: of "q", "k", "v" and "rest" (what the layer computes after attention) those whose values nobody reads.
        n_tokens: of the whole sequence, where the attention function sees a part of it.
        window: keys that a query of this layer sees, its own among them, where they are fewer; by the model's mask.
        documents: of a packed row.
    """

    layer: int | None = None
    unread: frozenset[str] = frozenset()
    n_tokens: int | None = None
    window: int | None = None
    documents: Documents | None = None

    def attend(
        self,
        q_BSNH: Tensor,
        k_BSGH: Tensor,
        v_BSGH: Tensor,
        *,
        spec: AttentionSpec,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """Attention output [B, S, N, H of V] for the rank's own tokens of the chunk."""
        raise NotImplementedError

    def keep_output(self, name: str, output: Tensor, stamp: Callable[[], Tensor] | None = None) -> None:
        """Takes the output of a linear of the layer, which nobody may write to; most calls do not want it.

        Args:
            stamp: gives a small tensor that says something of it, for `kept_stamp`; it is asked only by who wants it.
        """

    def kept_output(self, name: str) -> Tensor | None:
        """That of the same linear in the forward pass, if it was kept: then it need not be computed again.

        In a replay it is handed over; elsewhere others will read it, and nobody may write to it.
        """
        return None

    def kept_stamp(self, name: str) -> Tensor | None:
        """What was said of the output in the forward pass."""
        return None

    def keeps_outputs(self) -> bool:
        """Whether an output of a linear is of the forward pass, or may be kept for the backward pass."""
        return False


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


class AttentionReached(BaseException):
    """Ends a layer's forward once k and v are known; BaseException, so that no handler of the model catches it."""


class AttentionCall(Call):
    """The attention of one chunk inside one layer; `attend` is called by the registered function.

    A rank's own tokens and all heads go in and out; between the exchanges it holds the whole chunk for its heads.

    Attributes:
        qkv: q, k, v of the rank's tokens, and sinks where there are some, as the layer made them, with their graph in
            a replay.
        q: the chunk's queries for this rank's heads.
        sinks_N: the sinks of this rank's heads.
    """

    qkv: tuple[Tensor, ...] | None = None
    q: Tensor
    spec: AttentionSpec
    sinks_N: Tensor | None = None

    def __init__(self, run: LayerRun, chunk: Chunk, store: LayerKV) -> None:
        self.run, self.chunk, self.store, self.layer = run, chunk, store, run.index
        self.n_tokens, self.window, self.documents = run.plan.n_tokens, run.window, run.documents

    def attend(
        self,
        q_BSNH: Tensor,
        k_BSGH: Tensor,
        v_BSGH: Tensor,
        *,
        spec: AttentionSpec,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """Attention output [B, S, N, H of V] for the rank's own tokens of the chunk."""
        if self.qkv is not None:
            name = self.run.layer.name
            raise RuntimeError(f"hf_fpdt: {name} calls its attention function twice; it is not supported.")
        self.qkv, self.spec = (q_BSNH, k_BSGH, v_BSGH), spec
        if sinks_N is not None:
            self.qkv = (*self.qkv, sinks_N)
            self.sinks_N = sinks_N.detach()[self.run.layer.group.own_heads(len(sinks_N))]
        self.repeats = self.run.layer.group.kv_repeats(q_BSNH.shape[2], k_BSGH.shape[2])
        with torch.no_grad():
            q, *kv = q_BSNH.detach(), *(repeat_heads(x.detach(), self.repeats) for x in (k_BSGH, v_BSGH))
            return self._attend(q, *kv)

    def keep_output(self, name: str, output: Tensor, stamp: Callable[[], Tensor] | None = None) -> None:
        # Where a layer goes through a packed row's documents one by one, this is of one of them.
        if self.run.checkpoint is not None and self.run.one_by_one is None:
            self.run.checkpoint.put_linear(name, self.chunk, output)
            if stamp is not None and self.run.checkpoint.holds(name, self.chunk):
                self.run.stamps[name, self.chunk.index] = stamp()

    def keeps_outputs(self) -> bool:
        return self.run.checkpoint is not None and bool(self.run.checkpoint.linears)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Forward: this chunk's queries read every key so far."""
        self._exchange(q, k, v)
        row = self.row_forward()
        if self.run.checkpoint is not None and self.run.checkpoint.keeps_attention:
            self._keep(row)
        return self.run.layer.group.heads_to_seq(row[0])[0]

    def _keep(self, row: tuple[Tensor, Tensor], *, rebuilt: bool = False) -> None:
        for name, part in zip(("out", "lse"), row, strict=True):
            self.run.kept.put(name, self.chunk, part, rebuilt=rebuilt)

    def _exchange(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pieces for heads; k and v go into the store."""
        self.q, *kv = self.run.layer.group.seq_to_heads(q, k, v)
        self.store.put(self.chunk, *kv)

    def row_forward(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of this chunk's queries over the keys that they see of the store."""
        kernel, rows = self._calls()
        parts = [
            forward_row(kernel, self.q[:, queries], self.store.stream(spans), spec=self.spec, sinks_N=self.sinks_N)
            for queries, spans in rows
        ]
        if len(parts) == 1:
            return parts[0]
        parts.reverse()
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)

    def row_backward(self, d_leaf_BSNH: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Gradients of `qkv` for the rank's own tokens, complete if every later chunk's row was done before.

        Those of sinks are of this row and of this rank's heads alone: they add up over rows and ranks.
        """
        kernel, rows = self._calls(BACKWARD_CALL_TOKENS)
        (dout,) = self.run.layer.group.seq_to_heads(d_leaf_BSNH)
        parts = [
            backward_row(kernel, dout[:, at], self.q[:, at], _of_row(row, at), self.store, spans, spec=self.spec)
            for at, spans in rows
        ]
        dq = parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=1)
        dq, dk, dv = self.run.layer.group.heads_to_seq(dq, *self.store.take_grad(self.chunk))
        d_qkv = dq, sum_repeated_heads(dk, self.repeats), sum_repeated_heads(dv, self.repeats)
        return d_qkv if self.sinks_N is None else (*d_qkv, self._d_sinks(dout, row, self.sinks_N))

    def _d_sinks(self, dout: Tensor, row: tuple[Tensor, Tensor], sinks_N: Tensor) -> Tensor:
        assert self.qkv is not None
        d_sinks = torch.zeros_like(self.qkv[3])
        if not self.qkv[3].requires_grad:
            return d_sinks  # nobody asks
        d_sinks[self.run.layer.group.own_heads(len(d_sinks))] = sinks_gradient(dout, row, sinks_N)
        return d_sinks

    def _calls(self, most_tokens: int = 2**62) -> tuple[Kernel, list[tuple[slice, tuple[Span, ...]]]]:
        """The kernel, and of each part of the row its place among the chunk's queries and its spans of keys.

        The last part first: the first one alone reads earlier chunks, of which the next row wants the last one.
        """
        kernel = select_kernel(self.run.layer.kernel, self.q.device, self.q.dtype, self.spec)
        parts = row_calls(
            kernel,
            (self.chunk.start, self.chunk.stop),
            self.run.plan.chunk_tokens,
            self.store,
            window=self.window,
            documents=self.documents,
            most_tokens=most_tokens,
        )
        return kernel, parts[::-1]


def _of_row(row: tuple[Tensor, Tensor], queries: slice) -> tuple[Tensor, Tensor]:
    """(out, lse) of some of the queries; kernels want lse in one piece."""
    return row[0][:, queries], row[1][:, :, queries].contiguous()


class _AgainCall(AttentionCall):
    """What was kept in the forward pass is there, and stays."""

    def keep_output(self, name: str, output: Tensor, stamp: Callable[[], Tensor] | None = None) -> None:
        """It was made once more, for it had not been kept."""

    def kept_stamp(self, name: str) -> Tensor | None:
        return self.run.stamps.get((name, self.chunk.index))

    def kept_output(self, name: str) -> Tensor | None:
        return self.run.kept.peek(name, self.chunk) if self.run.kept.holds(name, self.chunk) else None


class CaptureCall(_AgainCall):
    unread = frozenset({"q", "rest"})

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store.put(self.chunk, *self.run.layer.group.seq_to_heads(k, v))
        raise AttentionReached


class RebuildCall(_AgainCall):
    """Forward again, for the sake of the layer's output; attention runs again only where its output was not kept."""

    def __init__(self, run: LayerRun, chunk: Chunk, store: LayerKV) -> None:
        super().__init__(run, chunk, store)
        if run.kept.holds("out", chunk):
            self.unread = frozenset({"q", "k", "v"})

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.run.kept.holds("out", self.chunk):
            return self.run.layer.group.heads_to_seq(self.run.kept.peek("out", self.chunk))[0]
        self._exchange(q, k, v)
        row = self.row_forward()
        self._keep(row, rebuilt=True)
        return self.run.layer.group.heads_to_seq(row[0])[0]


class ReplayCall(_AgainCall):
    """`leaf` is what the layer's forward saw as attention output; `row` is (out, lse) for this rank's heads."""

    leaf: Tensor
    row: tuple[Tensor, Tensor]

    def __init__(self, run: LayerRun, chunk: Chunk, store: LayerKV) -> None:
        super().__init__(run, chunk, store)
        if not run.traits.attends:
            self.unread = frozenset({"rest"})

    def kept_output(self, name: str) -> Tensor | None:
        return self.run.kept.take(name, self.chunk) if self.run.kept.holds(name, self.chunk) else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.store.holds(self.chunk):
            (self.q,) = self.run.layer.group.seq_to_heads(q)
        else:
            self._exchange(q, k, v)
        kept, chunk = self.run.kept, self.chunk
        self.row = (
            (kept.take("out", chunk), kept.take("lse", chunk)) if kept.holds("out", chunk) else self.row_forward()
        )
        self.leaf = self.run.layer.group.heads_to_seq(self.row[0])[0].detach().requires_grad_()
        self.unread = frozenset({"rest"})  # y is wanted for its graph alone
        return self.leaf


class TrialCall(Call):
    """Attention of each token to itself alone; it depends on q, k and v.

    Attributes:
        calls: how often it was called.
        asked: what it was asked for.
    """

    asked: Asked | None = None

    def __init__(self, window: int | None = None, n_tokens: int = 2**62) -> None:
        self.calls, self.window, self.n_tokens = 0, window, n_tokens

    def attend(
        self,
        q_BSNH: Tensor,
        k_BSGH: Tensor,
        v_BSGH: Tensor,
        *,
        spec: AttentionSpec,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """Output [B, S, N, H of V]."""
        self.calls += 1
        heads = AttentionSizes(q_BSNH.shape[2], k_BSGH.shape[2], spec.head_dim, spec.value_dim)
        self.asked = Asked(spec, q_BSNH.dtype, heads)
        k, v = (x.repeat_interleave(q_BSNH.shape[2] // x.shape[2], dim=2) for x in (k_BSGH, v_BSGH))
        scores = (q_BSNH * k).sum(-1, keepdim=True).mul(spec.scale)
        scores = scores if sinks_N is None else scores - sinks_N[:, None]
        return scores.sigmoid() * v
