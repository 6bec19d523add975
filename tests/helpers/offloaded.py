"""What the tests of offloaded training share: tiny models, budgets found by arithmetic, bytes measured by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory.entries import DeviceEntry, DiskTierEntry, HostEntry
from hf_fpdt.model.apply import FPDTHandle, applied_settings
from hf_fpdt.plan.checkpointing import forward_bytes, linear_bytes
from hf_fpdt.plan.placement import NO_LIMIT, PassPlacement, plan_pass
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import STAGING_BUFFERS, Budgets
from tests.engine.test_layer import batch, with_lora
from tests.helpers.truth import in_double, tiny

LAYERS, CHUNK, TOKENS, ROWS = 5, 32, 118, 2
POLICIES = ("attention", "input", "segment", "auto")
PLACES = ("host", "part", "disk", "tight", "tight part")
Results = dict[str, Tensor]


def model_of(case: str, dropout: float = 0.0, layers: int = LAYERS) -> PreTrainedModel:
    """A float64 model: a family, with "+lora" a PEFT model around it; dropout where the family has some."""
    family, _, lora = case.partition("+")
    hidden = {} if family == "llama" else {"hidden_dropout": dropout}
    model = in_double(tiny(family, num_hidden_layers=layers, **hidden))
    return with_lora(model, dropout) if lora else model


def sequences(n_tokens: int = TOKENS, rows: int = ROWS, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    ids, labels = batch(n_tokens, rows)
    return {"input_ids": ids, "labels": labels}


def gradients(model: PreTrainedModel, loss: Tensor) -> Results:
    """The loss and every gradient, which are taken away from the model."""
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    results = {"loss": loss.detach()} | {name: p.grad for name, p in named.items() if p.grad is not None}
    assert len(results) == len(named) + 1
    model.zero_grad(set_to_none=True)
    return results


def step(model: PreTrainedModel, data: dict[str, Tensor]) -> Results:
    """One forward and backward pass with a seed of its own."""
    torch.manual_seed(3)
    loss = model(**data).loss
    loss.backward()
    return gradients(model, loss)


def applied(model: PreTrainedModel, **settings: Any) -> tuple[PreTrainedModel, FPDTHandle]:
    """A copy of the model with FPDT on it."""
    model = copy.deepcopy(model)
    defaults = {"chunk_tokens": CHUNK, "host_budget_gib": 1, "loss_chunk_tokens": 50}
    return model, apply_fpdt(model, FPDTPlugin(**{**defaults, **settings}))


def assert_same_bits(ours: Results, expected: Results) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), f"{name} differs"


def sizes_of(model: PreTrainedModel, n_tokens: int = TOKENS, rows: int = ROWS) -> StepSizes:
    """Sizes of a step, as the layers find them."""
    probe, handle = applied(model)
    settings = applied_settings(probe)
    assert settings is not None
    hidden = torch.empty(rows, n_tokens, settings.sizes.hidden, dtype=next(probe.parameters()).dtype)
    handle.remove()
    return settings.step(hidden)


def least_host_bytes(policy: str, sizes: StepSizes, device: int = 0) -> int:
    """The smallest host budget that the policy works with, pages and K, V included."""
    low, high = 0, 2**30
    while low < high:
        middle = (low + high) // 2
        found: PassPlacement | None = None
        with suppress(MemoryError):
            found = plan_pass(policy, sizes, sizes.model.layers, Budgets(device, middle))
        low, high = (middle + 1, high) if found is None else (low, middle)
    return low


def budgets(place: str, policy: str, sizes: StepSizes, folder: Any) -> dict[str, Any]:
    """Settings that put a step's bytes in that place.

    "host": nothing on the device. "part": K, V of two chunks there, and some checkpoints. "disk": host memory for K, V
    and staging, and a little more. "tight": the host has what the policy needs at least, so inputs are rebuilt.
    """
    kv = sizes.kv_bytes(NO_LIMIT)
    # Two chunks and an entry; K and V of another do not fit.
    part = 4 * (kv.parts[0] + kv.grads[0]) + kv.parts[0]
    device = part if "part" in place else 0
    settings: dict[str, Any] = {"checkpoints": policy, "device_budget_gib": device / 2**30, "host_budget_gib": 1}
    if place == "disk":
        layer = sizes.layer_bytes()
        host = sizes.kv_bytes(0).host_buffer_bytes + STAGING_BUFFERS * layer.longest + layer.input_total
        settings |= {"disk_dir": str(folder), "host_budget_gib": host / 2**30}
    elif "tight" in place:
        settings["host_budget_gib"] = least_host_bytes(policy, sizes, device) / 2**30
    return settings


class Measured:
    """Bytes of the entries that exist, counted by their tensors, and the most of each tier."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(("device", "host", "disk"), 0)
        self.peak = dict(self.now)

    def count(self, tier: str, nbytes: int) -> None:
        self.now[tier] += nbytes
        self.peak[tier] = max(self.peak[tier], self.now[tier])


@contextmanager
def measured() -> Iterator[Measured]:
    """Count what the checkpoint store keeps inside; K and V are not checkpoints."""
    counter = Measured()
    with pytest.MonkeyPatch.context() as patch:
        for kind, tier in ((DeviceEntry, "device"), (HostEntry, "host"), (DiskTierEntry, "disk")):
            _count_entries(patch, kind, tier, counter)
        yield counter


def assert_linears_lie_as_planned(handle: FPDTHandle, found: Measured) -> None:
    """Of a step whose plan sends outputs of linears to the host: bytes of each tier are those of the plan."""
    (((sizes, _), plan),) = handle.store.plans.items()
    assert linear_bytes(plan.kept, sizes.layer_bytes()).host > 0
    assert found.peak["device"] == plan.forecast.device_bytes
    assert handle.store.used_bytes()["pinned"] == plan.forecast.host_bytes
    assert found.peak["host"] + found.peak["device"] == forward_bytes(plan.kept, sizes.layer_bytes())


def _count_entries(patch: pytest.MonkeyPatch, kind: Any, tier: str, counter: Measured) -> None:
    make, free = kind.__init__, kind.free
    sizes: dict[int, int] = {}

    def made(self: Any, value: Tensor, *args: Any) -> None:
        sizes[id(self)] = value.numel() * value.element_size()
        make(self, value, *args)
        if _is_checkpoint(self):
            counter.count(tier, sizes[id(self)])

    def freed(self: Any) -> None:
        free(self)
        nbytes = sizes.pop(id(self))
        if _is_checkpoint(self):
            counter.count(tier, -nbytes)

    patch.setattr(kind, "__init__", made)
    patch.setattr(kind, "free", freed)


def _is_checkpoint(entry: Any) -> bool:
    """K and V have buffers of their own pool."""
    return entry._place.pool is None or entry._place.pool is not entry._allocator.kv_pool


def everything_bytes(sizes: StepSizes) -> int:
    """The host bytes with which no layer of a step is rebuilt nor runs attention again."""
    forecast = plan_pass("attention", sizes, sizes.model.layers, Budgets(0, 2**30)).forecast
    return forecast.host_bytes
