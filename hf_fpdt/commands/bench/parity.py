"""Whether a stack computes what plain Hugging Face computes. No stack gets a speed that fails this.

Checked on a model of the job's own width with two layers, at a short odd length cut in several pieces, with
adapters that are not zero and some labels ignored. The truth is the same weights in float64; the stack's error, of the
loss and of every gradient, may be at most twice that of plain Hugging Face (SDPA) in the job's dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .job import Job
from .models import config_of, model_of, tokens_of
from .ranks import whole
from .stacks.base import Pieces, Stack

N_TOKENS = 1037
IGNORED_TOKENS = 50
LAYERS = 2
PIECES = 4
FACTOR = 2.0
# Standard deviation of a matrix's outputs for inputs of one, and so of scores. With more, peaks grow, and rounding
# grows faster: at 2, a scale that is wrong by 5 percent hides in what bfloat16 does to plain Hugging Face.
GAIN = 1.0
# No gradient is measured against less than this part of the largest one: where softmax does not see a bias, rounding
# is all there is.
LEAST_SIZE = 1e-3

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """The tensor that is worst off.

    Attributes:
        name: "loss", or a parameter whose gradient it is.
        ratio: its error over that of plain Hugging Face in the same dtype, against float64.
    """

    name: str
    ratio: float

    @property
    def passed(self) -> bool:
        """Whether every error is at most twice that of plain Hugging Face; a NaN is not."""
        return self.ratio <= FACTOR

    def badness(self) -> float:
        """How bad it is; a NaN is the worst."""
        return math.inf if math.isnan(self.ratio) else self.ratio

    def __str__(self) -> str:
        what = "the loss" if self.name == "loss" else f"the gradient of {self.name}"
        verdict = f"the error of {what} is {self.ratio:.3g} times that of plain Hugging Face in the same dtype"
        return verdict if self.passed else f"wrong, so no speed: {verdict}, at most {FACTOR:g} is allowed"


def check(stack: Stack, job: Job) -> Parity:
    """Compare a stack with plain Hugging Face.

    Raises:
        Unavailable: the stack cannot run here.
    """
    # Every rank compares for itself: gradients that only rank 0 has right are not right.
    config = config_of(job, most_layers=LAYERS)
    model = model_of(job, config)
    sharpen(model)
    ids = tokens_of(job, config, N_TOKENS)
    labels = ids.clone()
    labels[:, :IGNORED_TOKENS] = -100
    # Before the stack, which may change classes of the whole process.
    truth = results(Stack(), copy.deepcopy(model).double(), ids, labels)
    naive = errors(results(Stack(), copy.deepcopy(model), ids, labels), truth)
    stack.prepare(model, Pieces(most_tokens=N_TOKENS // PIECES))
    # FSDP2 is not to be had without an optimizer.
    spread, _ = stack.spread(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    ours = errors(results(stack, spread, ids, labels), truth)
    own = worst(ours, naive, floors(truth, getattr(torch, job.dtype)))
    return max(stack.world.gather(own), key=Parity.badness)


def sharpen(model: nn.Module) -> None:
    """New random matrices, adapters included: softmaxes that are not flat, gradients that are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=GAIN / math.sqrt(parameter.shape[-1]))


def results(stack: Stack, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Results:
    """The loss, and the whole gradient of each parameter by the name it has before DDP wraps it."""
    loss = stack.loss_and_backward(model, ids_BS, labels_BS)
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss} | {name: whole(grad) for name, grad in found.items()}


def errors(found: Results, truth: Results) -> dict[str, float]:
    """Norms of the differences; infinite for what is missing or should not be there."""
    wrong = dict.fromkeys(found.keys() ^ truth.keys(), math.inf)
    return wrong | {name: _norm(found[name].double() - truth[name]) for name in found.keys() & truth.keys()}


def floors(truth: Results, dtype: torch.dtype) -> dict[str, float]:
    """Errors that are none: half a unit in the last place.

    Of the loss, one number that may be right by luck, it is one; and four of fp32, in which transformers sums it up
    whatever the dtype, in the truth too.
    """
    sizes = {name: _norm(tensor) for name, tensor in truth.items()}
    loss, eps = sizes.pop("loss"), torch.finfo(dtype).eps
    least = LEAST_SIZE * max(sizes.values())
    of_loss = (eps + 4 * torch.finfo(torch.float32).eps) * loss
    return {"loss": of_loss} | {name: eps / 2 * max(size, least) for name, size in sizes.items()}


def worst(ours: Mapping[str, float], naive: Mapping[str, float], least: Mapping[str, float]) -> Parity:
    """The largest ratio of two errors; a NaN counts as the largest."""
    bounds = {name: max(naive.get(name, 0.0), least.get(name, 0.0) / FACTOR) for name in ours}
    ratios = {name: error / bounds[name] if bounds[name] else math.inf for name, error in ours.items()}
    return max((Parity(name, ratio) for name, ratio in ratios.items()), key=Parity.badness)


def _norm(tensor: Any) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))
