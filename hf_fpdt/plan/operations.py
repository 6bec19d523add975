"""Operations of a chunk, a pass and a step: all that are run, and those that strict MFU counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..layout import Chunk
from .checkpointing import KeptLayers
from .sizes import ModelSizes, StepSizes

# The backward kernel of attention makes the scores again: five products where the forward one has two.
BACKWARD_OPERATIONS = 2.5


def strict_flops(model: ModelSizes, vocabulary: int, n_tokens: int, *, full: bool) -> float:
    """Operations that a step on one sequence needs, none of them twice; causal attention at half.

    tokens · (4·N + 6·L·S·heads·head_dim) where adapters train, 6·N where every weight does. N are the linear weights
    of the base model and of its head: no adapters, no embeddings.
    """
    weights = model.layers * model.linear_weights + vocabulary * model.hidden
    attention = 6 * model.layers * n_tokens * model.q_heads * model.head_dim
    return n_tokens * ((6 if full else 4) * weights + attention)


WorkPhase = Literal["forward", "rebuild", "backward"]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one rank.

    Attributes:
        done: all of them, recomputation too, causal attention at half.
        strict: those that the model needs, none of them twice.
    """

    done: float = 0.0
    strict: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.done + other.done, self.strict + other.strict)

    def __mul__(self, times: int) -> Work:
        return Work(self.done * times, self.strict * times)


def chunk_work(step: StepSizes, chunk: Chunk, phase: WorkPhase, *, attends: bool, full: bool) -> Work:
    """One layer's work on one chunk.

    Args:
        attends: whether attention runs forward in this phase.
        full: whether every weight trains, not adapters alone.
    """
    m, ranks = step.model, step.plan.sp_size
    linear = 2.0 * step.batch * (chunk.rank_stop - chunk.rank_start) * m.linear_weights
    attention = 2.0 * step.batch * (chunk.stop**2 - chunk.start**2) * m.q_heads * m.head_dim / ranks
    if phase != "backward":
        done = linear + attention * attends
        return Work(done, done if phase == "forward" else 0.0)
    # Replay, gradients of inputs and of weights; the kernel's backward makes the scores again.
    gradients = (2 if full else 1) * linear
    return Work(linear + gradients + BACKWARD_OPERATIONS * attention + attention * attends, gradients + 2 * attention)


def pass_work(step: StepSizes, kept: KeptLayers, *, full: bool) -> Work:
    """All layers, forward and backward."""
    total = Work()
    for chunk in step.plan.chunks:
        forward, rebuilt, rebuilt_whole, backward, again = (
            chunk_work(step, chunk, phase, attends=attends, full=full) for phase, attends in _KINDS
        )
        total += forward * kept.layers
        for layer in range(kept.layers):
            below_rebuilt = layer + 1 < kept.layers and not kept.inputs[layer + 1]
            if below_rebuilt:
                total += rebuilt if kept.attentions[layer] else rebuilt_whole
            total += backward if kept.attentions[layer] or below_rebuilt else again
    return total


_KINDS: tuple[tuple[WorkPhase, bool], ...] = (
    ("forward", True),
    ("rebuild", False),
    ("rebuild", True),
    ("backward", False),
    ("backward", True),
)
