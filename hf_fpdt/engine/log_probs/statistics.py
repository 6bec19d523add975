"""What a chunk of logits says of each token, and the gradient that comes back into the logits.

Logits stay in their own dtype; what is computed with them is in fp32 (float64 for float64 logits), for as many tokens
at a time as fill 64 MiB, so that no fp32 copy of the chunk exists.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ...labels import IGNORE_INDEX
from ...numerics import accumulation_dtype

SLICE_BYTES = 64 * 2**20
# Beside log_probs: what else may be asked of a token's distribution. The first carries a gradient.
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def log_probs_of(
    logits_TV: Tensor, labels_T: Tensor, temperature: float, asked: Collection[str], *, wants_gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Log-probabilities of labels, and what is asked beside them.

    Args:
        logits_TV: of a chunk's tokens.
        labels_T: the token that each is to predict, 0..V-1.
        temperature: what logits are divided by.
        asked: of `STATISTICS`.

    Returns:
        [T] each by its name ("log_probs" among them), in fp32, float64 for float64 logits, `is_top1` as booleans; and
        the gradient of the sum of log-probabilities [T, V] in the logits' dtype, or None.
    """
    logits, gradient = logits_TV.detach(), None
    if fused := _has_kernel(logits, temperature):
        losses, gradient = _kernels(logits, labels_T, wants_gradient=wants_gradient)
        log_probs = losses.neg_()
        gradient = None if gradient is None else gradient.neg_()
    elif wants_gradient:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    parts = []
    for rows in _slices(logits) if asked or not fused else ():
        wide = _tempered(logits[rows], temperature)
        labels = labels_T[rows, None]
        parts.append(_statistics(wide, labels, asked))
        if gradient is not None and not fused:
            gradient[rows] = _d_logits(wide, labels, None, None).div_(temperature)
    found = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return found | ({"log_probs": log_probs} if fused else {}), gradient


def d_logits_of(
    logits_TV: Tensor, labels_T: Tensor, temperature: float, d_log_probs_T: Tensor | None, d_entropy_T: Tensor | None
) -> Tensor:
    """The gradient that comes into logits from those of log-probabilities and entropies, in the logits' dtype."""
    logits = logits_TV.detach()
    if d_entropy_T is None and d_log_probs_T is not None and _has_kernel(logits, temperature):
        gradient = _kernels(logits, labels_T, wants_gradient=True)[1]
        assert gradient is not None
        return gradient.mul_(-d_log_probs_T[:, None])
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _slices(logits):
        parts = [None if d is None else d[rows, None] for d in (d_log_probs_T, d_entropy_T)]
        if d_log_probs_T is None:
            parts[0] = torch.zeros_like(labels_T[rows, None], dtype=accumulation_dtype(logits.dtype))
        gradient[rows] = _d_logits(_tempered(logits[rows], temperature), labels_T[rows, None], *parts).div_(
            temperature
        )
    return gradient


def _slices(logits_TV: Tensor) -> Iterator[slice]:
    size = max(1, SLICE_BYTES // (4 * logits_TV.shape[1]))
    return (slice(start, start + size) for start in range(0, logits_TV.shape[0], size))


def _tempered(logits_TV: Tensor, temperature: float) -> Tensor:
    """A copy in fp32 (float64), divided by the temperature; callers may write to it."""
    wide = logits_TV.to(accumulation_dtype(logits_TV.dtype), copy=True)
    return wide if temperature == 1 else wide.div_(temperature)


def _statistics(z_TV: Tensor, labels_T1: Tensor, asked: Collection[str]) -> dict[str, Tensor]:
    top = z_TV.amax(-1, keepdim=True)
    found = {}
    if "mean_logits" in asked:
        found["mean_logits"] = z_TV.mean(-1)
    if "is_top1" in asked:  # the first of equal ones
        found["is_top1"] = z_TV.argmax(-1) == labels_T1[:, 0]
    log_p = z_TV - top
    log_p -= log_p.logsumexp(-1, keepdim=True)
    found["log_probs"] = log_p.gather(-1, labels_T1)[:, 0]
    if "entropy" in asked:
        found["entropy"] = -(log_p.exp() * log_p).nan_to_num_(0.0).sum(-1)  # of a logit of -inf
    if "log_sum_sq_probs" in asked:
        found["log_sum_sq_probs"] = (2 * log_p).logsumexp(-1)
    return found


def _d_logits(z_TV: Tensor, labels_T1: Tensor, d_log_probs_T1: Tensor | None, d_entropy_T1: Tensor | None) -> Tensor:
    """Without `d_log_probs_T1` it is 1 of each token."""
    log_p = z_TV - z_TV.amax(-1, keepdim=True)
    log_p -= log_p.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    extra = None
    if d_entropy_T1 is not None:
        entropy = -(p * log_p).nan_to_num_(0.0).sum(-1, keepdim=True)
        extra = (p * (log_p + entropy)).nan_to_num_(0.0).mul_(d_entropy_T1)
    gradient = p.neg_()
    gradient.scatter_add_(-1, labels_T1, torch.ones_like(labels_T1, dtype=gradient.dtype))
    if d_log_probs_T1 is not None:
        gradient.mul_(d_log_probs_T1)
    return gradient if extra is None else gradient.sub_(extra)


def _has_kernel(logits: Tensor, temperature: float) -> bool:
    """Whether the loss's kernel of Triton does it."""
    wide = logits.dtype == torch.float64 or temperature != 1
    return logits.is_cuda and not wide and importlib.util.find_spec("triton") is not None


def _kernels(logits_TV: Tensor, labels_T: Tensor, *, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    from ..cross_entropy.kernel import cross_entropy_rows

    return cross_entropy_rows(logits_TV, labels_T, IGNORE_INDEX, wants_gradient=wants_gradient)
