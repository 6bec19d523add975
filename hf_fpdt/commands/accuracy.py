"""Is a result as accurate as plain Hugging Face's? The one rule, of `hf-fpdt check` and of `hf-fpdt bench`.

Both are measured against the same computation in float64, each tensor by the Euclidean norm of its error. Ours may
be at most `FACTOR` times the plain run's in the same dtype: errors of rounding are of that size, and what a wrong
scale, a lost chunk or an open diagonal does is far larger.

A plain run may be right by luck, so there is a size that its error counts as at the least. There are two such sizes,
as there are two questions. `check` compares any kernel in any dtype on a small model with peaks, and takes what the
plain run's rounding is elsewhere (`least_of_run`). `bench` compares in bfloat16 on a model without peaks, where an
error of a few percent in one tensor is to be seen, and takes what rounding the tensor itself would do
(`least_of_dtype`), which is less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
# No tensor is asked to be more exact than this share of the largest: where softmax does not see a bias, rounding is
# everything.
SMALL = 1e-3
FEW = 16  # numbers: of fewer, only the error together with all others says something; the loss is the exception
TINY = 1e-300
LOSS, TOGETHER = "loss", "all together"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Worst:
    """The tensor that is worst off.

    Attributes:
        name: "loss", a parameter whose gradient it is, or "all together".
        ratio: its error over that of the plain run in the same dtype, against float64; infinite where it is missing.
    """

    name: str
    ratio: float

    @property
    def passed(self) -> bool:
        """Whether every error is at most `FACTOR` times the plain run's; a NaN is not."""
        return self.ratio <= FACTOR

    def badness(self) -> float:
        """How bad it is; a NaN is the worst."""
        return math.inf if math.isnan(self.ratio) else self.ratio


def errors(found: Tensors, truth: Tensors) -> dict[str, float]:
    """Norms of the differences; infinite for what is missing or should not be there."""
    wrong = dict.fromkeys(found.keys() ^ truth.keys(), math.inf)
    return wrong | {name: _norm(found[name].double() - truth[name]) for name in truth if name in found}


def worst(ours: Mapping[str, float], plain: Mapping[str, float], least: Mapping[str, float]) -> Worst:
    """The largest ratio of two errors; a NaN counts as the largest.

    Args:
        ours, plain: errors by name.
        least: what the plain error counts as at the least.
    """
    bounds = {name: max(plain.get(name, 0.0), least.get(name, 0.0)) for name in ours}
    ratios = {name: error / bounds[name] if bounds[name] else math.inf for name, error in ours.items()}
    return max((Worst(name, ratio) for name, ratio in ratios.items()), key=Worst.badness)


def worst_of_run(ours: Tensors, plain: Tensors, truth: Tensors) -> Worst:
    """The rule with `least_of_run`; besides each tensor, all of them count as one.

    Args:
        ours, plain, truth: tensors by name; names and shapes of `plain` are those of the truth.
    """
    if ours.keys() != truth.keys():
        return Worst(f"no gradient, or one too many, of {min(ours.keys() ^ truth.keys())}", math.inf)
    our_errors, plain_errors = errors(ours, truth), errors(plain, truth)
    told_apart = [name for name, tensor in truth.items() if name == LOSS or tensor.numel() >= FEW]
    counted, plainly = (
        {TOGETHER: _together(each)} | {name: each[name] for name in told_apart} for each in (our_errors, plain_errors)
    )
    return worst(counted, plainly, least_of_run(plain_errors, truth))


def least_of_run(plain: Mapping[str, float], truth: Tensors) -> dict[str, float]:
    """Of each tensor, as much as the relative error of the plain run over all of them makes of it."""
    sizes, roots = {name: _norm(t) for name, t in truth.items()}, {name: t.numel() ** 0.5 for name, t in truth.items()}
    relative = _together(plain) / max(_together(sizes), TINY)
    largest = max(size / roots[name] for name, size in sizes.items())
    least = {name: relative * max(size, SMALL * largest * roots[name]) for name, size in sizes.items()}
    return {TOGETHER: TINY} | {name: max(size, TINY) for name, size in least.items()}


def least_of_dtype(truth: Tensors, dtype: torch.dtype) -> dict[str, float]:
    """Of each tensor so much that half a unit in the last place is no error.

    Of the loss, one number that may be right by luck, it is one unit; and four of fp32, in which transformers sums it
    up whatever the dtype, in the truth too.
    """
    sizes = {name: _norm(tensor) for name, tensor in truth.items()}
    loss, eps = sizes.pop(LOSS), torch.finfo(dtype).eps
    largest = SMALL * max(sizes.values())
    of_loss = (eps + 4 * torch.finfo(torch.float32).eps) * loss
    none = {LOSS: of_loss} | {name: eps / 2 * max(size, largest) for name, size in sizes.items()}
    return {name: error / FACTOR for name, error in none.items()}


def _together(sizes: Mapping[str, float]) -> float:
    """Of all tensors as one. Not `math.hypot`, for which infinity beside a NaN is no NaN."""
    return float(sum(size * size for size in sizes.values()) ** 0.5)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def in_double(model: Any) -> Any:
    """The model itself, in float64: the truth that others are measured against."""
    if model.config._experts_implementation not in (None, "eager"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model.double()
