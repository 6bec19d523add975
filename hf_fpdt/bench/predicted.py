"""What the planner foretold of a step that was run: its memory and its seconds."""

from __future__ import annotations

from torch import nn

from ..model import FPDTHandle, mostly_trained
from ..offload import GIB
from ..rates import gpu_named, step_seconds

# Weights have gradients as large as they are; Adam has two states.
ADAM_STATES = 2


def predicted(handle: FPDTHandle, model: nn.Module, n_tokens: int, gpu_name: str) -> dict[str, float]:
    """Of a step of one sequence with AdamW in the weights' dtype; nothing is measured for it.

    Args:
        handle: what `apply_fpdt` gave for `model`; a step of that length was run.
        gpu_name: as its driver says it.

    Returns:
        predicted_device_gib: GPU memory at its peak.
        predicted_pinned_gib: pinned host memory.
        predicted_s: seconds, where the kind of GPU is known.
    """
    plans = handle.store.plans.items()
    step, plan = next((step, plan) for (step, layers), plan in plans if layers and step.plan.n_tokens == n_tokens)
    told = plan.foretold
    assert told is not None
    on_host = told.host_bytes > plan.kv.host_bytes
    working = step.working_bytes(plan.kv, checkpoints_elsewhere=on_host, resident=True)
    found = {
        "predicted_device_gib": (_fixed_bytes(model) + working + told.device_bytes) / GIB,
        "predicted_pinned_gib": told.host_bytes / GIB,
    }
    gpu = gpu_named(gpu_name)
    if gpu is not None:
        full = mostly_trained(list(model.parameters()))
        found["predicted_s"] = step_seconds(step, plan.kept, gpu, full=full)
    return found


def _fixed_bytes(model: nn.Module) -> int:
    """Weights, their gradients and Adam's states."""
    sizes = {p: p.numel() * p.element_size() for p in model.parameters()}
    return sum(size * (2 + ADAM_STATES if p.requires_grad else 1) for p, size in sizes.items())
