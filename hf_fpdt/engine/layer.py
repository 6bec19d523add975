"""The layer executor: a decoder layer run chunk by chunk, for any architecture (paper sections 4.1 and 4.2).

Everything in a decoder layer but attention acts on each token alone, and attention reaches the registered function as
finished q, k, v. So the model's OWN layer forward is called on one chunk of hidden states at a time, and an attention
call of `run` does the sequence-wide part. Its role depends on the pass:

    forward   k, v into the store; the chunk's queries read chunks 0..i; out and lse may be kept
    rebuild   forward again, for a layer above whose input was not kept; kept attention outputs are not made again
    capture   k, v into the store again, and the layer's forward ends there (backward pass, token-local, cheap)
    replay    the layer runs with grad; q, k, v keep their graph, and the caller gets a LEAF that holds the output

Backward goes through the chunks in DESCENDING order. Row i completes dq_i, and also dk_i, dv_i, because only rows ≥ i
read chunk i; so each chunk is replayed once and only K, V, dK, dV outlive a row. Of a recurrent layer the states that
a chunk began with are kept, and their gradients go down with the rows (see `recurrent`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from ..layout import Chunk, Documents
from .calls import (
    AttentionCall,
    AttentionReached,
    CaptureCall,
    RebuildCall,
    ReplayCall,
    calling,
)
from .gradients import GradientSums
from .layer_run import LayerKV, LayerRun
from .recurrent import StandInCache, hidden_states_of, scans_over
from .replay_state import RandomState, untouched_random_state, versions_of


def run_layer(run: LayerRun, hidden_BSD: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A layer on the whole sequence, differentiable in `hidden_BSD` and `parameters`.

    Returns:
        Its output [B, S, D], and the sum that it says aside, if any.
    """
    run.begin(hidden_BSD)
    output_BSD, aside = _ChunkedLayer.apply(run, hidden_BSD, *parameters)
    run.end(output_BSD)
    return output_BSD, aside


class _ChunkedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: LayerRun, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        output: Tensor | None = None
        aside: Tensor | None = None
        states: dict[str, Tensor] = {}
        versions = versions_of(parameters)
        with (
            torch.cuda.device_of(hidden),  # kernels of Triton and flash-attn-4 run where the process is
            record_function(f"fpdt::forward {run.layer.name}"),
            run.autocast.again(),
            run.weights(backward=False),
            run.kv_store(hidden.device, backward=False) as store,
        ):
            for chunk in run.plan.chunks:
                x = hidden[:, chunk.rank_slice]
                _keep_input(run, chunk, x)
                cache = run.cache_of(chunk, states)
                with run.noting() as given:
                    y = _on_chunk(run, chunk, x, AttentionCall(run, chunk, store), cache)
                part = run.sum_aside(given, chunk)
                aside = part if aside is None or part is None else aside + part
                states = _keep_states(run, chunk, cache)
                output = y.new_empty(*hidden.shape[:2], y.shape[2]) if output is None else output
                output[:, chunk.rank_slice] = y
                if run.checkpoint is not None:
                    run.checkpoint.settle()
                run.advance("forward", chunk)
        assert output is not None
        ctx.run, ctx.hidden_dtype, ctx.parameters = run, hidden.dtype, parameters
        # Autograd then refuses weights that were changed before backward; `check_unchanged` those that it cannot tell.
        ctx.save_for_backward(*run.watched(parameters, versions))
        return output, aside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_aside: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not what was saved: hooks around saved tensors (save_on_cpu) give copies, of which nobody asks a gradient.
        run, parameters, _ = ctx.run, ctx.parameters, ctx.saved_tensors
        run.check_unchanged(parameters)
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        sums = GradientSums(wanted)
        with (
            run.layer.store.one_thread.entered(run.layer.name),
            record_function(f"fpdt::backward {run.layer.name}"),
            untouched_random_state(d_output.device),
        ):
            _rebuild_input(run, d_output.device)
            d_hidden = torch.zeros_like(d_output, dtype=ctx.hidden_dtype) if ctx.needs_input_grad[1] else None
            _expect_backward(run)
            d_states: dict[str, Tensor] = {}
            with (
                torch.enable_grad(),
                run.kv_store(d_output.device, backward=True) as store,
                run.autocast.again(),
                run.weights(backward=True),
            ):
                for chunk in reversed(run.plan.chunks):
                    _capture_kv(run, store, chunk)
                    dx = None if d_hidden is None else d_hidden[:, chunk.rank_slice]
                    attends, dy = not run.kept.holds("out", chunk), d_output[:, chunk.rank_slice]
                    call, d_after = ReplayCall(run, chunk, store), (dy, d_aside, d_states)
                    d_states = _backward_chunk(run, chunk, call, d_after, dx, sums)
                    run.kept.forget_linears(chunk)  # what nobody asked for after all
                    run.advance("backward", chunk, attends=attends)
        grads = sums.totals()
        return None, d_hidden, *(grads.get(id(p)) for p in parameters)


def _on_chunk(run: LayerRun, chunk: Chunk, x_BSD: Tensor, call: AttentionCall, cache: StandInCache) -> Tensor:
    """The layer's own forward on one chunk, its attention done by `call`, its states those of `cache`."""
    part, marked = run.documents_of(chunk), run.traits.by_documents == "marks"
    scans = scans_over(run.layer.module, run.layer.group, part, marked=marked) if run.state_names else nullcontext()
    if part is not None and not run.state_names:
        cache.before = part.before_own(x_BSD.device)
    with calling(call), scans:
        if run.one_by_one is not None:
            y_BSD = _by_document(run, run.one_by_one, chunk, x_BSD, cache)
        else:
            y_BSD = hidden_states_of(run.layer.forward(x_BSD, **run.arguments_of(chunk, cache)))
    did, usual = (call.qkv is not None, list(cache.finals)), (run.traits.attends, run.state_names)
    if did != usual:
        raise RuntimeError(
            f"hf_fpdt: {run.layer.name} did something else this time than when it was tried: attention and states "
            f"{did}, then {usual}; so cutting it in chunks is not exact. Layers must do the same in every step."
        )
    return y_BSD


def _by_document(run: LayerRun, documents: Documents, chunk: Chunk, x_BSD: Tensor, cache: StandInCache) -> Tensor:
    """A recurrent layer's own forward on each document of a chunk: only the one that goes on has states before it.

    `cache` is left with the states of the last document, which the next chunk may go on with.
    """
    parts, last = [], cache
    for piece in documents.pieces(chunk):
        # A single token that goes on would be taken for one to be decoded, which has no backward pass: the next one
        # comes with it, whose output, and the states after it, nobody wants.
        single = piece.goes_on and piece.stop - piece.start == 1 and piece.stop < chunk.stop
        stop = piece.stop + single
        part = Chunk(chunk.index, piece.start, stop, piece.start, stop)
        last = cache if piece.goes_on else run.cache_of(part, {})
        last.before = piece.start - documents.start_of(piece.start)
        x = x_BSD[:, piece.start - chunk.start : stop - chunk.start]
        y = hidden_states_of(run.layer.forward(x, **run.arguments_of(part, last)))
        parts.append(y[:, : piece.stop - piece.start])
    cache.finals = last.finals
    return torch.cat(parts, dim=1)


def _keep_states(run: LayerRun, chunk: Chunk, cache: StandInCache) -> dict[str, Tensor]:
    """The states that a chunk left, which the next one begins with; in backward too."""
    states = {name: state.detach() for name, state in cache.finals.items()}
    if run.checkpoint is not None and chunk is not run.plan.chunks[-1]:
        for name, state in states.items():
            run.checkpoint.put(name, run.plan.chunks[chunk.index + 1], state)
    return states


def _states_before(run: LayerRun, chunk: Chunk) -> dict[str, Tensor]:
    """The states that a chunk began with, which stay in the record."""
    return {name: run.kept.peek(name, chunk) for name in run.state_names} if chunk.index else {}


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
        with (
            record_function(f"fpdt::rebuild {lower.layer.name}"),
            lower.autocast.again(),
            lower.gathered_weights(),
        ):
            _forward_again(lower, upper, device)


def _forward_again(lower: LayerRun, upper: LayerRun, device: torch.device) -> None:
    """Keep the output of `lower` as the input of `upper`, as the forward pass would have; inside of its autocast."""
    chunks = lower.plan.chunks
    lower.kept.expect(lower.kept.entries("input", *lower.state_names, "out", chunks=chunks))
    with torch.no_grad(), lower.kv_store(device, backward=False) as store:
        for chunk in chunks:
            lower.random_states[chunk.index].restore()
            x, attends = lower.kept.peek("input", chunk), not lower.kept.holds("out", chunk)
            cache = lower.cache_of(chunk, _states_before(lower, chunk))
            y = _on_chunk(lower, chunk, x, RebuildCall(lower, chunk, store), cache)
            upper.kept.put("input", chunk, y, rebuilt=True)
            lower.kept.settle()
            upper.kept.settle()
            lower.advance("rebuild", chunk, attends=attends)


def _expect_backward(run: LayerRun) -> None:
    """Tell the store what this layer's backward pass reads, and with what the layer below begins."""
    captured, reads, last = set[Chunk](), list[Any](), run.plan.chunks[-1]
    linears = run.step.model.linears_of(run.index)
    of_kv = [linear.entry for linear in linears if linear.captured]
    early, late = ([linear.entry for linear in linears if linear.late == after] for after in (False, True))
    for chunk in reversed(run.plan.chunks):
        missing = [each for each in run.plan.read_by(chunk, run.window, run.documents)[:-1] if each not in captured]
        missing = missing if run.traits.attends else []
        captured.update(missing)
        reads += run.kept.entries("input", *run.state_names, *of_kv, chunks=missing)
        reads += run.kept.entries("input", *run.state_names, *early, "out", "lse", *late, chunks=[chunk])
    below = run.below
    while below is not None and not below.kept.holds("input", last):
        below = below.below
    if below is not None:
        reads += below.kept.entries("input", chunks=run.plan.chunks)
    run.kept.expect(reads)


def _capture_kv(run: LayerRun, store: LayerKV, chunk: Chunk) -> None:
    """K, V of the earlier chunks that the row of `chunk` reads, made again from their inputs where they are not here.

    The last row asks for all of them, or for those in its window; the last chunk's replay brings its own.
    """
    missing = store.missing(chunk) if run.traits.attends else []
    if not missing:
        return
    with torch.no_grad(), run.autocast.again():
        for earlier in missing:
            run.random_states[earlier.index].restore()
            x, cache = run.kept.peek("input", earlier), run.cache_of(earlier, _states_before(run, earlier))
            with suppress(AttentionReached):
                _on_chunk(run, earlier, x, CaptureCall(run, earlier, store), cache)


def _backward_chunk(
    run: LayerRun,
    chunk: Chunk,
    call: ReplayCall,
    d_after: tuple[Tensor, Tensor | None, Mapping[str, Tensor]],
    dx: Tensor | None,
    sums: GradientSums,
) -> dict[str, Tensor]:
    """Backward of one chunk, later chunks done: writes the input's gradient to `dx` and adds parameters' to `sums`.

    Args:
        d_after: gradients of the chunk's output, of its sum aside, and of the states that it left for the next.

    Returns:
        Gradients of the states that it began with, by name.
    """
    run.random_states[chunk.index].restore()
    x = run.kept.take("input", chunk).detach().requires_grad_(dx is not None)
    states = {name: run.kept.take(name, chunk) for name in run.state_names} if chunk.index else {}
    cache = run.cache_of(chunk, states, leaves=True)
    dy, d_aside, d_finals = d_after
    with run.noting() as given:
        y = _on_chunk(run, chunk, x, call, cache)
    aside = None if d_aside is None else run.sum_aside(given, chunk)
    given.clear()
    inputs = [*([] if dx is None else [x]), *cache.given.values()]
    leaf = [call.leaf] if run.traits.attends else []
    if chunk is run.plan.chunks[-1]:
        sums.check_complete([y, *(call.qkv or ()), *cache.finals.values()], [x, *leaf, *cache.given.values()])

    # Out-projection, MLP, residual, recurrence. Some layers share nodes between this part and q, k, v, so the graph is
    # kept where there is attention; it goes with y, and the MLP's activations are gone before attention runs.
    finals = {name: state for name, state in cache.finals.items() if name in d_finals and state.requires_grad}
    outputs, d_outputs = [y, *finals.values()], [dy, *(d_finals[name] for name in finals)]
    if aside is not None and d_aside is not None and aside.requires_grad:
        outputs, d_outputs = [*outputs, aside], [*d_outputs, d_aside]
    found = sums.differentiate(outputs, d_outputs, [*leaf, *inputs], retain_graph=bool(leaf))
    del y, finals, aside, outputs
    cache.finals.clear()
    parts = [found[len(leaf) :]]
    if leaf:
        parts.append(_attention_backward(call, found[0], inputs, sums))
    if dx is not None:
        for part in parts:
            each = part.pop(0)
            dx.add_(each) if each is not None else None
    return _sums_of(cache.given, parts)


def _attention_backward(
    call: ReplayCall, d_leaf: Tensor | None, inputs: list[Tensor], sums: GradientSums
) -> list[Tensor | None]:
    """What comes into `inputs` through q, k and v; parameters' gradients are added to `sums`."""
    assert call.qkv is not None
    differentiable = [t.requires_grad for t in call.qkv]
    if d_leaf is None or not any(differentiable):
        return [None] * len(inputs)
    d_qkv = compress(call.row_backward(d_leaf, call.row), differentiable)
    return sums.differentiate(list(compress(call.qkv, differentiable)), list(d_qkv), inputs)


def _sums_of(names: Iterable[str], parts: list[list[Tensor | None]]) -> dict[str, Tensor]:
    """Of each name the gradients that came by any way; of those that none came to, nothing."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        for name, grad in zip(names, part, strict=True):
            if grad is not None:
                sums[name] = sums[name] + grad if name in sums else grad
    return sums
