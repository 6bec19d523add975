"""Log-probabilities of the next tokens, differentiable, without a tensor of the size tokens × vocabulary.

What a loss makes of log-probabilities is known only when it comes back. So logits are computed again in the backward
pass, chunk by chunk, and their gradient goes into hidden states there. They are not where the gradient was formed in
the forward pass already: where the head is frozen (LoRA), each token's gradient only needs its factor; where it
trains, one sum over tokens (SFT) needs one factor for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...numerics import accumulation_dtype
from ..gradients import GradientSums
from ..loss import Head
from ..replay_state import Autocast, RandomState, modes_of, untouched_random_state
from .statistics import STATISTICS, d_logits_of, log_probs_of


@dataclass
class LastUse:
    """What the last backward pass was given, by which the next forward pass goes.

    Attributes:
        summed: whether each log-probability had the same factor, as in a plain sum; until one is seen, so is it taken.
    """

    summed: bool = True


@dataclass(frozen=True)
class LogProbs:
    """Of the tokens of a batch, [B, S] each: about the NEXT token of each position, 0 where no label counts.

    Attributes:
        log_probs: of the labels, in fp32 (float64 for float64 logits).
        label_mask: whether a label counts.
        entropy: of the distribution, in nats; carries a gradient, as log_probs do.
        log_sum_sq_probs: log Σ p².
        mean_logits: of the logits, divided by the temperature.
        is_top1: whether the label is the first of the likeliest tokens.
    """

    log_probs: Tensor
    label_mask: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def chunked_log_probs(
    head: Head,
    hidden_BSD: Tensor,
    shift_labels_BS: Tensor,
    *,
    temperature: float = 1.0,
    asked: Collection[str] = (),
    last_use: LastUse | None = None,
    modules: Sequence[torch.nn.Module] = (),
) -> LogProbs:
    """Log-probabilities of `shift_labels_BS` under softmax(logits / temperature).

    Logits are made of tokens with a label alone, gathered for a chunk at a time.

    Args:
        shift_labels_BS: the next token of each position, `head.ignore_index` where there is none.
        temperature: what logits are divided by.
        asked: of `STATISTICS`, what else is computed; the others are None.
        last_use: remembered from call to call; None: always as after a plain sum.
        modules: of the head, whose modes and adapters may not change before the backward pass.
    """
    labels = shift_labels_BS.to(hidden_BSD.device)
    mask = labels != head.ignore_index
    call = _Call(head, temperature, tuple(asked), last_use or LastUse(), modules)
    found = _ChunkedLogProbs.apply(call, torch.is_grad_enabled(), labels, mask, hidden_BSD, *head.parameters)
    return LogProbs(found[0], mask, **dict(zip(STATISTICS, found[1:], strict=True)))


@dataclass
class _Call:
    """What the backward pass finds again.

    Attributes:
        random_states: of each chunk of tokens, before it ran.
        formed: gradients that the forward pass made, of hidden states and of weights, each log-probability counting
            once; None where there are none, or they were used.
    """

    head: Head
    temperature: float
    asked: tuple[str, ...]
    last_use: LastUse
    modules: Sequence[torch.nn.Module]
    autocast: Autocast = field(init=False)
    modes: list[tuple[object, ...]] = field(init=False)
    random_states: list[RandomState] = field(init=False, default_factory=list)
    formed: tuple[Tensor | None, GradientSums] | None = field(init=False, default=None)

    def chunks(self, places_N: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The places (row, token) of tokens whose logits are made at a time."""
        return list(zip(*(each.split(max(1, self.head.chunk_tokens)) for each in places_N), strict=True))

    def check_modes(self) -> None:
        """Raise RuntimeError where the head would compute something else now than in the forward pass."""
        if [modes_of(module) for module in self.modules] != self.modes:
            raise RuntimeError(
                "hf_fpdt: adapters or training mode of the head changed between forward and backward, which runs it "
                "again: call backward first (inside of disable_adapter(), before set_adapter() or eval())."
            )


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, grad_enabled: bool, labels: Tensor, mask: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        wanted = [p for p in parameters if p.requires_grad] if grad_enabled else []
        x_wanted, places = grad_enabled and hidden.requires_grad, mask.nonzero(as_tuple=True)
        forms = (x_wanted or bool(wanted)) and (not wanted or call.last_use.summed)
        if forms:
            call.formed = torch.zeros_like(hidden) if x_wanted else None, GradientSums(wanted)
        call.autocast, call.modes = Autocast.now(hidden.device), [modes_of(module) for module in call.modules]
        kinds = {name: accumulation_dtype(hidden.dtype) for name in ("log_probs", *call.asked)}
        kinds |= {"is_top1": torch.bool} if "is_top1" in call.asked else {}
        results = {name: torch.zeros(mask.shape, dtype=kind, device=hidden.device) for name, kind in kinds.items()}
        with (
            torch.cuda.device_of(hidden),
            call.autocast.again(),
            torch.enable_grad() if forms else nullcontext(),
        ):
            for place in call.chunks(places):
                call.random_states.append(RandomState.now(hidden.device))
                for name, values in _chunk_forward(call, hidden, labels[place], place).items():
                    results[name][place] = values
        ctx.call, ctx.parameters = call, parameters
        ctx.save_for_backward(hidden, labels, *places, *parameters)
        outputs = tuple(results.get(name) for name in ("log_probs", *STATISTICS))
        ctx.mark_non_differentiable(*(each for each in outputs[2:] if each is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        hidden, labels, *rest = ctx.saved_tensors  # autograd refuses weights that were changed since
        places = rest[0], rest[1]
        x_wanted, *needed = ctx.needs_input_grad[4:]
        wanted = [p for p, need in zip(ctx.parameters, needed, strict=True) if need]
        given = [None if d is None else d[places] for d in (d_log_probs, d_entropy)]
        factor = _one_factor(given[0]) if wanted else None
        if wanted and len(places[0]):
            call.last_use.summed = factor is not None and d_entropy is None
        formed, call.formed = call.formed, None
        if formed is not None and d_log_probs is not None and d_entropy is None and (factor is not None or not wanted):
            d_hidden, sums = formed
            if d_hidden is not None:
                d_hidden.mul_(d_log_probs.where(labels != call.head.ignore_index, 0)[..., None])
            totals = sums.totals(factor)
        else:
            del formed
            d_hidden, sums = torch.zeros_like(hidden) if x_wanted else None, GradientSums(wanted)
            call.check_modes()
            with (
                torch.cuda.device_of(hidden),
                untouched_random_state(hidden.device),
                call.autocast.again(),
                torch.enable_grad(),
            ):
                for index, place in enumerate(call.chunks(places)):
                    call.random_states[index].restore()
                    d = [None if each is None else each[place] for each in (d_log_probs, d_entropy)]
                    _chunk_backward(call, (hidden, labels[place]), place, d, (d_hidden, sums))
            totals = sums.totals()
        if not len(places[0]):  # nothing was computed, and DDP waits for something
            totals = {id(p): torch.zeros_like(p) for p in wanted}
        return None, None, None, None, d_hidden, *(totals.get(id(p)) for p in ctx.parameters)


def _one_factor(d_log_probs_N: Tensor | None) -> Tensor | None:
    """The gradient that every log-probability has; None where they differ."""
    if d_log_probs_N is None or not len(d_log_probs_N):
        return None
    low, high = torch.aminmax(d_log_probs_N)
    return low if bool(low == high) else None


def _chunk_forward(call: _Call, hidden: Tensor, labels_N: Tensor, place: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What is asked of the tokens at `place`; adds to the gradients that are formed, where any are."""
    x = hidden[place][None].detach()
    if call.formed is None:
        logits = call.head.logits_of(x)[0]
        return log_probs_of(logits, labels_N, call.temperature, call.asked, wants_gradient=False)[0]
    d_hidden, sums = call.formed
    x.requires_grad_(d_hidden is not None)
    logits = call.head.logits_of(x)[0]
    found, d_logits = log_probs_of(logits, labels_N, call.temperature, call.asked, wants_gradient=True)
    assert d_logits is not None
    _differentiate(logits, d_logits, x, place, call.formed)
    return found


def _chunk_backward(
    call: _Call,
    chunk: tuple[Tensor, Tensor],
    place: tuple[Tensor, ...],
    d: Sequence[Tensor | None],
    into: tuple[Tensor | None, GradientSums],
) -> None:
    """The gradients of a chunk's log-probabilities and entropies go into hidden states and the head's weights."""
    hidden, labels_N = chunk
    x = hidden[place][None].detach().requires_grad_(into[0] is not None)
    logits = call.head.logits_of(x)[0]
    _differentiate(logits, d_logits_of(logits, labels_N, call.temperature, *d), x, place, into)


def _differentiate(
    logits_NV: Tensor,
    d_logits_NV: Tensor,
    x: Tensor,
    place: tuple[Tensor, ...],
    into: tuple[Tensor | None, GradientSums],
) -> None:
    d_hidden, sums = into
    sums.check_complete([logits_NV], [x])
    (dx,) = sums.differentiate([logits_NV], [d_logits_NV], [x]) if d_hidden is not None else (None,)
    if d_hidden is None:
        sums.differentiate([logits_NV], [d_logits_NV], [])
    elif dx is not None:
        d_hidden[place] = dx[0]
