"""Transformers' modules of experts, run by `operation`: which of them, and why others are not.

They share one dispatcher (`use_experts_implementation`), which says how weights lie, and whether there are biases and
a gate. Where it was to run "grouped_mm", which is its default, the module's forward is replaced by the same sum.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from ..fused_linear import entry_of, is_unread, keep_output, kept_output, kept_stamp
from ..patch import is_patched, patch
from ..settings import Settings
from .gates import OwnGate, gate_of
from .operation import Weights, run_experts
from .passes import Gate
from .routes import Routes

logger = logging.getLogger(__name__)
REPLACED = "grouped_mm"
FIRST, UNGATED, SECOND, BIAS = "gate_up_proj", "up_proj", "down_proj", "_bias"
OLDEST = (8, 0)  # of the compute capabilities that torch has grouped products for
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@moe.use_experts_implementation
class _Dispatched(nn.Module):
    def forward(self) -> None:
        """Never called: the decorator puts its dispatcher in place."""


def are_experts(module: nn.Module) -> bool:
    """Whether the module is one that transformers' dispatcher of experts runs."""
    forward: Any = type(module).forward
    ours: Any = _Dispatched.forward
    return getattr(forward, "__code__", None) is ours.__code__


def experts_are_replaced(layers: Iterable[nn.Module]) -> bool:
    """Whether there are experts in some layer, and all that there are will be replaced."""
    found = [module for layer in layers for module in layer.modules() if are_experts(module)]
    return bool(found) and all(_are_asked_for(module) and why_not_replaced(module) is None for module in found)


def replace_experts(module: Any, settings: Settings) -> None:
    """Patch a module of experts, unless there is a reason not to, which is said once."""
    if is_patched(module) or not are_experts(module) or not _are_asked_for(module):
        return
    reason = why_not_replaced(module)
    if reason is None:
        patch(module, _forward, settings)
    else:
        _say_not_replaced(type(module).__name__, reason)


def why_not_replaced(module: Any) -> str | None:
    """Why such experts run as the model has them; None where they need not."""
    if "forward" in vars(module):
        return "their forward was replaced"
    if moe.ALL_EXPERTS_FUNCTIONS[REPLACED] is not moe.grouped_mm_experts_forward:
        return f"{REPLACED!r} was registered anew"
    if getattr(module, "has_post_expert_norm", False):
        return "each has a norm of its own"
    known = {_first_name(module), SECOND} | {f"{name}{BIAS}" for name in (_first_name(module), SECOND)}
    parameters = dict(module.named_parameters())
    if unknown := sorted(parameters.keys() - known):
        return f"what {', '.join(unknown)} does is not known"
    kinds = {parameter.dtype for parameter in parameters.values()}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        return f"weights are of {', '.join(sorted(map(str, kinds)))}"
    return _why_no_products(next(iter(parameters.values())).device)


def first_product(module: Any) -> tuple[int, int, int]:
    """(features of a token, those that its first product gives for one expert, bytes of an element of these)."""
    weight = getattr(module, _first_name(module))
    _, *features = weight.shape if module.is_transposed else weight.transpose(-2, -1).shape
    return features[0], features[1], weight.element_size()


def _why_no_products(device: torch.device) -> str | None:
    """Weights without memory are asked about for a plan, of whatever machine."""
    if device.type not in ("cuda", "cpu", "meta"):
        return f"grouped products on {device.type} were never tried"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return "this GPU has no grouped products"
    return None


def _are_asked_for(module: Any) -> bool:
    """Whether the model was to run them by grouped products; who names another way gets it."""
    return bool(module.config._experts_implementation == REPLACED)


@functools.cache
def _say_not_replaced(name: str, reason: str) -> None:
    logger.warning("hf_fpdt: %s run as the model has them, slower and in more memory: %s.", name, reason)


def _first_name(module: Any) -> str:
    return FIRST if module.has_gate else UNGATED


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    first, second = getattr(self, _first_name(self)), getattr(self, SECOND)
    if hidden_states.dim() != 2 or first.dim() != 3 or not _are_asked_for(self):
        result: Tensor = self._fpdt.forward(hidden_states, top_k_index, top_k_weights)
        return result
    if not self.is_transposed:
        first, second = first.transpose(-2, -1), second.transpose(-2, -1)
    biases = (getattr(self, f"{name}{BIAS}") if self.has_bias else None for name in (_first_name(self), SECOND))
    unread = is_unread(self)
    if unread and not torch.is_grad_enabled():
        return torch.empty_like(hidden_states)
    routes, weights = Routes.of(top_k_index, self.num_experts), Weights(first, second, *biases)
    kept = kept_output(self, routes.order_S.shape)
    if kept is not None:
        _check_routes(kept_stamp(self), routes)
    take = functools.partial(_keep, self, routes) if entry_of(self) is not None else None
    return run_experts(hidden_states, top_k_weights, routes, weights, _gate(self), unread, kept, take)


def _keep(module: Any, routes: Routes, gate_up_SJ: Tensor) -> None:
    """Of the forward pass the first product's output, if it is to be kept, and which rows it is of."""
    keep_output(module, gate_up_SJ, routes.stamp)


def _check_routes(stamp: Tensor | None, routes: Routes) -> None:
    """Fail where a replay chose other experts than the forward pass, without waiting for the device.

    A router sees the same values in the same order, so it chooses the same; what was kept would be of other rows.
    """
    assert stamp is not None
    torch._assert_async(
        stamp == routes.stamp(),
        "hf_fpdt: the router chose other experts when a layer was run again for its backward pass than in its forward "
        'pass, whose products were kept; without kept ones (checkpoints="attention") gradients would be of neither.',
    )


def _gate(module: Any) -> Gate | OwnGate:
    """The module's gate, asked for again when a number of the module, or its code, has changed."""
    state = tuple((key, value) for key, value in vars(module).items() if isinstance(value, (bool, int, float)))
    asked = (*state, type(module), id(getattr(module, "act_fn", None)))
    known: dict[tuple[object, ...], Gate | OwnGate] = module._fpdt.found
    if asked not in known:
        known.clear()
        known[asked] = gate_of(module)
    return known[asked]
