"""What gradients and optimizer will still take of the GPU once training has begun."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..plan import state_bytes, sum_bytes


def parameter_count(parameters: Iterable[nn.Parameter], *, trained: bool = False) -> int:
    """Numbers in all of them, or in those that train; under FSDP2 of all ranks together."""
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def kind_of(optimizer: Any) -> str:
    """The kind of an optimizer, by its class's name; "adamw", the largest of them, where that says nothing.

    Args:
        optimizer: of torch, transformers or bitsandbytes, or accelerate's around it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__.lower()
    if "adam" in name and ("8bit" in name or getattr(getattr(inner, "args", None), "optim_bits", 32) == 8):
        return "adamw-8bit"
    if "sgd" in name:
        return "sgd-momentum" if inner.defaults.get("momentum") else "sgd"
    return name if name in ("adafactor", "lion") else "adamw"


@dataclass
class TrainingMemory:
    """What training one model will still take of the device, beside a step's activations.

    Attributes:
        model: with the weights that train.
        layers: its decoder layers.
        optimizer: of those weights, if it is known; else it is taken for AdamW. Weak: a copied model has another.
    """

    model: nn.Module
    layers: list[nn.Module]
    optimizer: weakref.ref[Any] | None = None

    def __call__(self) -> int:
        """Bytes of gradients and optimizer states that are not there yet, and of the sums of gradients over chunks."""
        own = [(p, getattr(p, "_local_tensor", p)) for p in self.model.parameters() if p.requires_grad]
        gradients = sum(local.numel() * local.element_size() for p, local in own if p.grad is None)
        inside = [parameter_count(layer.parameters(), trained=True) for layer in self.layers]
        outside = parameter_count(self.model.parameters(), trained=True) - sum(inside)
        return gradients + self._states(own) + sum_bytes(max(outside, *inside))

    def _states(self, own: list[tuple[Any, Any]]) -> int:
        optimizer = None if self.optimizer is None else self.optimizer()
        kind = "adamw" if optimizer is None else kind_of(optimizer)
        there = {} if optimizer is None else optimizer.state
        return sum(state_bytes(kind, local.numel(), local.element_size()) for p, local in own if p not in there)
