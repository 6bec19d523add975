"""Operations of a chunk, a pass and a step: all that are run, and those that strict MFU counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..layout import Chunk, Documents, seen_pairs
from .checkpointing import KeptLayers
from .model_sizes import LayerMix, ModelSizes
from .sizes import StepSizes

# The backward kernel of attention makes the scores again: five products where the forward one has two. So it is where
# keys and values are equally wide; see `ModelSizes.attention_backward`.
BACKWARD_OPERATIONS = 2.5


def strict_flops(
    model: ModelSizes, vocabulary: int, n_tokens: int, *, full: bool, documents: Documents | None = None
) -> float:
    """Operations that a step on one sequence needs, none of them twice; of attention the pairs that a layer sees.

    tokens · (4·N + 6·L·S·heads·head_dim) where adapters train, 6·N where every weight does. N are the linear weights
    of the base model and of its head: no adapters, no embeddings. The second term is causal attention, at half; a
    layer with a window, and a packed row of several documents, has fewer pairs, and values of another width count by
    it. A recurrent layer scans its states instead: 6 operations a token and element of them forward (see `LayerMix`),
    and twice as many backward.
    """
    weights = sum(mix.linear_weights for mix in model.all_mixes) + vocabulary * model.hidden
    scans = 3 * sum(mix.scan_operations for mix in model.mixes)
    return n_tokens * ((6 if full else 4) * weights + scans) + 3 * attention_of_all(model, n_tokens, documents)


def attention_of_all(model: ModelSizes, n_tokens: int, documents: Documents | None = None) -> float:
    """Operations of attention forward, in all layers, on one sequence or on one packed row."""
    mixes = model.all_mixes
    windows = Counter(window for window, mix in zip(model.windows_at(n_tokens), mixes, strict=True) if mix.attends)
    pairs = {window: seen_pairs(0, n_tokens, window, documents) for window in windows}
    return sum(count * model.attention_forward(pairs[window]) for window, count in windows.items())


WorkPhase = Literal["forward", "rebuild", "backward"]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one rank.

    Attributes:
        done: all of them, recomputation too; of attention the pairs that are seen.
        strict: those that the model needs, none of them twice.
    """

    done: float = 0.0
    strict: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.done + other.done, self.strict + other.strict)

    def __mul__(self, times: int) -> Work:
        return Work(self.done * times, self.strict * times)


def chunk_work(
    step: StepSizes,
    chunk: Chunk,
    phase: WorkPhase,
    *,
    attends: bool,
    full: bool,
    window: int | None = None,
    mix: LayerMix | None = None,
) -> Work:
    """One layer's work on one chunk; outputs of linears that were kept count as computed again.

    Args:
        attends: whether attention runs forward in this phase.
        full: whether every weight trains, not adapters alone.
        window: the keys that a query of the layer sees; None: all before it.
        mix: what the layer does; None: what the model's first does.
    """
    m, ranks = step.model, step.plan.sp_size
    mix = m.mix(0) if mix is None else mix
    tokens = step.batch * (chunk.rank_stop - chunk.rank_start)
    linear, scan = 2.0 * tokens * mix.linear_weights, float(tokens * mix.scan_operations)
    seen = seen_pairs(chunk.start, chunk.stop, window, step.documents)
    pairs = step.batch * seen / ranks * mix.attends
    attention = m.attention_forward(pairs)
    if phase != "backward":
        done = linear + scan + attention * attends
        return Work(done, done if phase == "forward" else 0.0)
    # Replay, gradients of inputs and of weights; the kernel's backward makes the scores again.
    gradients = (2 if full else 1) * linear
    done = linear + gradients + 3 * scan + m.attention_backward(pairs) + attention * attends
    return Work(done, gradients + 2 * scan + 2 * attention)


def pass_work(step: StepSizes, kept: KeptLayers, *, full: bool) -> Work:
    """All layers of the pass, the last ones of the model, forward and backward."""
    kinds, total = zip(step.windows_of_last(kept.layers), step.mixes_of_last(kept.layers), strict=True), Work()
    # Layers of one kind that do the same things, and how many there are.
    alike = Counter((kind, done) for layer, kind in enumerate(kinds) for done in _done(kept, layer))
    for chunk in step.plan.chunks:
        for ((window, mix), (phase, attends)), count in alike.items():
            total += chunk_work(step, chunk, phase, attends=attends, full=full, window=window, mix=mix) * count
        for layer in range(len(kept.linears)):
            again = sum(phase != "forward" for phase, _ in _done(kept, layer))
            total += Work(-spared_operations(step, kept, layer, chunk)) * again
    return total


def spared_operations(step: StepSizes, kept: KeptLayers, layer: int, chunk: Chunk) -> float:
    """Operations of one pass over a chunk that are not done again, as outputs of a layer's linears were kept."""
    tokens, chunks = step.batch * (chunk.rank_stop - chunk.rank_start), len(step.plan.chunks)
    linears = step.model.linears_of(step.model.layers - kept.layers + layer)
    pairs = zip(linears, kept.linears_of(layer), strict=False)
    there = (linear for linear, each in pairs if each.tier(chunk.index, chunks) is not None)
    return 2.0 * tokens * sum(linear.inputs * linear.outputs for linear in there)


def _done(kept: KeptLayers, layer: int) -> Iterator[tuple[WorkPhase, bool]]:
    """What is done of a layer, and whether its attention runs forward in it."""
    yield "forward", True
    rebuilds = layer + 1 < kept.layers and not kept.inputs[layer + 1]
    if rebuilds:
        yield "rebuild", not kept.attentions[layer]
    yield "backward", not (kept.attentions[layer] or rebuilds)
