"""Cross-entropy of a chunk of logits together with its gradient, which is known as soon as the loss is.

On a GPU one kernel reads the logits twice and writes the gradient, in their own dtype; PyTorch's way passes over fp32
copies of them nine times. Both compute in fp32 (float64 for float64 logits).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ...numerics import accumulation_dtype


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, ignore_index: int, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of the tokens' losses, its gradient [T, V] in the logits' dtype or None if it is not wanted).

    Tokens labelled `ignore_index` count for nothing. Any other label outside of 0..V-1 raises IndexError or
    RuntimeError on a CPU, and makes the loss NaN on a GPU, where nothing waits for the labels.
    """
    logits = logits_TV.detach()
    if logits.is_cuda and logits.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from .kernel import cross_entropy_rows

        losses, gradient = cross_entropy_rows(logits, labels_T, ignore_index, wants_gradient=wants_gradient)
        return losses.sum(), gradient
    return _plain(logits, labels_T, ignore_index, wants_gradient=wants_gradient)


def _plain(
    logits_TV: Tensor, labels_T: Tensor, ignore_index: int, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    wide = logits_TV.to(accumulation_dtype(logits_TV.dtype))
    counted = (labels_T != ignore_index)[:, None]
    labels = labels_T[:, None].masked_fill(~counted, 0)
    below_top = wide - wide.amax(-1, keepdim=True)  # small where it matters, so that little is lost in the difference
    lse = below_top.logsumexp(-1, keepdim=True)
    loss = (lse - below_top.gather(-1, labels)).masked_fill(~counted, 0).sum()
    if not wants_gradient:
        return loss, None
    gradient = below_top.sub_(lse).exp_()
    gradient.scatter_add_(-1, labels, gradient.new_full((), -1.0).expand_as(labels))
    return loss, gradient.masked_fill_(~counted, 0).to(logits_TV.dtype)
