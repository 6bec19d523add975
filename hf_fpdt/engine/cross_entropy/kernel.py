"""The Triton kernel of `cross_entropy`; imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


def cross_entropy_rows(
    logits_TV: Tensor, labels_T: Tensor, ignore_index: int, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(loss of each token in fp32 [T], gradient of their sum [T, V] or None); a label out of range gives NaN."""
    n_tokens, vocabulary = logits_TV.shape
    logits = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    losses = torch.empty(n_tokens, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if wants_gradient else None
    _cross_entropy_row[(n_tokens,)](
        logits,
        labels_T.contiguous(),
        losses,
        gradient,
        logits.stride(0),
        ignore_index,
        VOCABULARY=vocabulary,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return losses, gradient


@triton.jit
def _cross_entropy_row(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows none for pointers
    logits_ptr,
    labels_ptr,
    losses_ptr,
    gradient_ptr,
    row_stride,
    ignore_index,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    columns = tl.arange(0, BLOCK)

    # Each lane keeps the maximum and the sum of its own columns; finite to begin with, for the lanes that have none.
    highest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        at = start + columns
        x = tl.load(logits_ptr + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    lse = tl.log(tl.sum(total * tl.exp(highest - top), 0))  # of what is left above the maximum

    in_range = (label >= 0) & (label < VOCABULARY)
    at_label = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counted, lse - (at_label - top), 0.0))
    if gradient_ptr is not None:
        gradient_ptr += row * VOCABULARY
        for start in range(0, VOCABULARY, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < VOCABULARY, other=0.0).to(tl.float32)
            probability = tl.exp(x - top - lse)
            difference = tl.where(at == label, probability - 1.0, probability)
            tl.store(gradient_ptr + at, tl.where(counted, difference, 0.0), mask=at < VOCABULARY)
