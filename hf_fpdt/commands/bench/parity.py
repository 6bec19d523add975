"""Whether a stack computes what plain Hugging Face computes. No stack gets a speed that fails this.

Checked on a model of the job's own width with two layers, at a short odd length cut in several pieces, with
adapters that are not zero and some labels ignored. The truth is the same weights in float64, the plain run Hugging
Face's with SDPA in the job's dtype; `commands.accuracy` has the rule for the loss and every gradient.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import plain_kernels
from ...labels import IGNORE_INDEX
from ...model import dequantise, quantise, with_lora
from ..accuracy import FACTOR, LOSS, Tensors, Worst, errors, in_double, least_of_dtype, worst
from ..float64 import float64_throughout
from .job import Job
from .models import config_of, model_of, packed_row, tokens_of, without_first_tokens
from .ranks import whole
from .stacks.base import Pieces, Stack

N_TOKENS = 1037
IGNORED_TOKENS = 50
LAYERS = 2
PIECES = 4
# Standard deviation of a matrix's outputs for inputs of one, and so of scores. With more, peaks grow, and rounding
# grows faster: at 2, a scale that is wrong by 5 percent hides in what bfloat16 does to plain Hugging Face.
GAIN = 1.0


def verdict(found: Worst) -> str:
    """A line for people."""
    what = "the loss" if found.name == LOSS else f"the gradient of {found.name}"
    text = f"the error of {what} is {found.ratio:.3g} times that of plain Hugging Face in the same dtype"
    return text if found.passed else f"wrong, so no speed: {text}, at most {FACTOR:g} is allowed"


def check(stack: Stack, job: Job) -> Worst:
    """Compare a stack with plain Hugging Face.

    Raises:
        Unavailable: the stack cannot run here.
    """
    # Every rank compares for itself: gradients that only rank 0 has right are not right.
    config = config_of(job, most_layers=LAYERS)
    model, wide, alone = _models(job, config)
    ids = tokens_of(job, config, N_TOKENS)
    labels = ids.clone()
    labels[:, :IGNORED_TOKENS] = IGNORE_INDEX
    stack.packed = packed_row(job, ids)
    labels, plain = without_first_tokens(labels, stack.packed), Stack()
    plain.packed = stack.packed
    # Before the stack, which may change classes of the whole process.
    with float64_throughout(), plain_kernels(wide):
        truth = results(plain, wide, ids, labels)
    naive = errors(results(plain, alone, ids, labels), truth)
    stack.prepare(model, Pieces(most_tokens=N_TOKENS // PIECES))
    # FSDP2 is not to be had without an optimizer.
    spread, _ = stack.spread(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    ours = errors(results(stack, spread, ids, labels), truth)
    own = worst(ours, naive, least_of_dtype(truth, getattr(torch, job.dtype)))
    return max(stack.world.gather(own), key=Worst.badness)


def _models(job: Job, config: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The model for the stack, the same in float64, and the same for plain Hugging Face."""
    if job.quantised is not None:
        return _quantised(job, config), in_double(_quantised(job, config, dequantised=True)), _quantised(job, config)
    model = model_of(job, config)
    sharpen(model)
    return model, in_double(copy.deepcopy(model)), copy.deepcopy(model)


def _quantised(job: Job, config: Any, *, dequantised: bool = False) -> Any:
    """Made anew each time, for some linears of bitsandbytes cannot be copied; sharpened before they are quantised."""
    base: Any = model_of(replace(job, full=True, quantised=None), config)
    sharpen(base)
    quantise(base, job.quantised or "", getattr(torch, job.dtype))
    if dequantised:
        dequantise(base, getattr(torch, job.dtype), job.device)
    model = with_lora(base)
    adapters = torch.Generator(job.device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.normal_(std=GAIN / math.sqrt(parameter.shape[-1]), generator=adapters)
    return model


def sharpen(model: nn.Module) -> None:
    """New random matrices, adapters included: softmaxes that are not flat, gradients that are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=GAIN / math.sqrt(parameter.shape[-1]))


def results(stack: Stack, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensors:
    """The loss, and the whole gradient of each parameter by the name it has before DDP wraps it."""
    loss = stack.loss_and_backward(model, ids_BS, labels_BS)
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {LOSS: loss} | {name: whole(grad) for name, grad in found.items()}
