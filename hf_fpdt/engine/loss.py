"""The head by chunks: final norm, logits and cross-entropy without a tensor of the size tokens × vocabulary.

Gradients are formed in the forward pass, while a chunk's logits exist (the paper chunks its loss likewise, section
5.4), and scaled in the backward pass. So logits are computed once, and any later scaling of the loss (gradient
accumulation, a GradScaler, a division by the number of processes) acts as on a plain loss. Sums over tokens are
divided once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..labels import IGNORE_INDEX
from .cross_entropy import cross_entropy
from .gradients import GradientSums
from .replay_state import Autocast


@dataclass(frozen=True)
class Head:
    """How logits are made from hidden states.

    Attributes:
        logits_of: hidden [B, S, D] → logits [B, S, V], each token alone.
        parameters: everything `logits_of` may train.
        chunk_tokens: tokens (over the batch) whose logits exist at a time.
        ignore_index: label that counts for nothing.
    """

    logits_of: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    chunk_tokens: int
    ignore_index: int = IGNORE_INDEX


def chunked_loss(
    head: Head, hidden_BSD: Tensor, shift_labels_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of `hidden_BSD` against the next tokens, in fp32 (float64 for float64 logits).

    Args:
        shift_labels_BS: the next token of each position, `head.ignore_index` where there is none.
        num_items: what the sum is divided by; None: the labels that count, as `CrossEntropyLoss` with "mean" does.
            Where no label counts the loss is NaN and gradients are zero, likewise.
    """
    labels = shift_labels_BS.to(hidden_BSD.device)
    total = _ChunkedLoss.apply(head, torch.is_grad_enabled(), labels, hidden_BSD, *head.parameters)
    if num_items is None:
        num_items = (labels != head.ignore_index).sum()
    # Filled in on the device: a number that is copied there would make the host wait.
    counted = num_items.to(total.device) if isinstance(num_items, Tensor) else torch.full_like(total, num_items)
    nothing = (counted == 0) & (total == 0)  # over 0 the gradients' factor would be infinite, and 0 times that NaN
    return torch.where(nothing, torch.nan, total / torch.where(nothing, 1, counted))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, grad_enabled: bool, labels: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        wanted = [p for p in parameters if p.requires_grad] if grad_enabled else []
        sums, total = GradientSums(wanted), None
        d_hidden = torch.empty_like(hidden) if grad_enabled and hidden.requires_grad else None
        grad_needed = d_hidden is not None or bool(wanted)
        size = max(1, head.chunk_tokens // hidden.shape[0])
        grad_mode = torch.enable_grad() if grad_needed else nullcontext()
        with torch.cuda.device_of(hidden), Autocast.now(hidden.device).again(), grad_mode:
            for tokens in (slice(start, start + size) for start in range(0, hidden.shape[1], size)):
                x = hidden[:, tokens].detach().requires_grad_(d_hidden is not None)
                logits = head.logits_of(x)
                loss, d_logits = cross_entropy(
                    logits.flatten(0, 1), labels[:, tokens].flatten(), head.ignore_index, wants_gradient=grad_needed
                )
                if d_logits is not None:
                    if total is None:
                        sums.check_complete([logits], [x])
                    dx = sums.differentiate([logits], [d_logits.view_as(logits)], [] if d_hidden is None else [x])
                    _write(d_hidden, tokens, dx)
                total = loss if total is None else total + loss
        ctx.grads, ctx.parameter_ids = (d_hidden, sums), [id(p) for p in parameters]
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "hf_fpdt: the chunked loss frees its gradients as backward uses them: run the forward pass again."
            )
        (d_hidden, sums), ctx.grads = ctx.grads, None
        totals = sums.totals(d_loss)
        return (
            None,
            None,
            None,
            None if d_hidden is None else d_hidden.mul_(d_loss),
            *map(totals.get, ctx.parameter_ids),
        )


def _write(whole_BSD: Tensor | None, tokens: slice, part: list[Tensor | None]) -> None:
    """Put the one gradient in `part` (None: zeros) at its place in `whole_BSD` (None: nobody wants it)."""
    if whole_BSD is not None:
        whole_BSD[:, tokens] = 0 if part[0] is None else part[0]


def norm_by_chunks(
    forward: Callable[[Tensor], Tensor], hidden_BSD: Tensor, parameters: Sequence[Tensor], chunk_tokens: int
) -> Tensor:
    """`forward(hidden_BSD)` for a module that acts on each token alone, in chunks and recomputed in backward.

    A norm in fp32 over the whole sequence would hold several fp32 copies of it.
    """
    return _ChunkedNorm.apply(forward, chunk_tokens, hidden_BSD, *parameters)


class _ChunkedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: Callable[[Tensor], Tensor], size: int, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.chunk_forward, ctx.size, ctx.autocast = forward, size, Autocast.now(hidden.device)
        ctx.save_for_backward(hidden, *parameters)
        with torch.cuda.device_of(hidden), ctx.autocast.again():
            normed = None
            for start in range(0, max(1, hidden.shape[1]), size):
                part = forward(hidden[:, start : start + size])
                # Written in place: pieces beside their whole would be the states of a sequence once more.
                normed = part.new_empty(hidden.shape) if normed is None else normed
                normed[:, start : start + size] = part
            assert normed is not None
            return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        needs_input, *needs_parameter = ctx.needs_input_grad[2:]
        sums = GradientSums([p for p, needed in zip(parameters, needs_parameter, strict=True) if needed])
        d_hidden = torch.empty_like(hidden) if needs_input else None
        with torch.enable_grad(), ctx.autocast.again():
            for start in range(0, hidden.shape[1], ctx.size):
                tokens = slice(start, start + ctx.size)
                x = hidden[:, tokens].detach().requires_grad_(needs_input)
                dx = sums.differentiate([ctx.chunk_forward(x)], [d_output[:, tokens]], [x] if needs_input else [])
                _write(d_hidden, tokens, dx)
        totals = sums.totals()
        return None, None, d_hidden, *(totals.get(id(p)) for p in parameters)
