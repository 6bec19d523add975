"""What the planner predicted of a step that was run: its memory and its seconds."""

from __future__ import annotations

from torch import nn

from ...forecast import gpu_named, peak_bytes, step_seconds, ulysses_seconds
from ...memory import parameter_count
from ...model import FPDTHandle, decoder_layers, mostly_trained, scale_bytes, waiting_names
from ...plan import OPTIMIZERS, sum_bytes
from ...units import GIB
from .stacks.base import base_of

ADAM_STATES, _ = OPTIMIZERS["adamw"]


def predicted(handle: FPDTHandle, model: nn.Module, n_tokens: int, gpu_name: str) -> dict[str, float]:
    """Of a step of one sequence with AdamW in the weights' dtype, all of them on each GPU; nothing is measured for it.

    Args:
        handle: what `apply_fpdt` gave for `model`; a step of that length was run.
        gpu_name: as its driver says it.

    Returns:
        predicted_device_gib: memory of this process's GPU at its peak.
        predicted_pinned_gib: host memory that this process pins.
        predicted_s: seconds, where the kind of GPU is known.
    """
    plans = [(step, plan) for (step, _), plan in handle.store.plans.items()]
    # A group's ranks have parts of one length, so it may be longer by a few tokens.
    step, plan = min(plans, key=lambda each: abs(each[0].plan.n_tokens - n_tokens))
    layers = decoder_layers(base_of(model))
    inside = sum(_bytes(layer, trained=True) for layer in layers)
    sums = sum_bytes(max(parameter_count(layer.parameters(), trained=True) for layer in layers))
    beside = peak_bytes(step, plan, _bytes(model, trained=True) - inside, inside, sums)
    found = {
        "predicted_device_gib": (_weights_and_states(model) + beside) / GIB,
        "predicted_pinned_gib": plan.forecast.host_bytes / GIB,
    }
    gpu = gpu_named(gpu_name)
    if gpu is not None:
        full = mostly_trained(list(model.parameters()))
        found["predicted_s"] = step_seconds(step, plan.kept, gpu, full=full) + ulysses_seconds(step, plan.kept, gpu)
    return found


def _weights_and_states(model: nn.Module) -> int:
    waiting = set(waiting_names(model))
    resident = [p for name, p in model.named_parameters() if name not in waiting]
    scales = 0 if waiting else scale_bytes(model)  # they wait with the rest
    return sum(p.numel() * p.element_size() for p in resident) + scales + ADAM_STATES * _bytes(model, trained=True)


def _bytes(module: nn.Module, *, trained: bool = False) -> int:
    """Of parameters, each once; gradients of those that train are as large as they are."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)
