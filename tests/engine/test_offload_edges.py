"""Offload at its edges: too little memory, models that are copied, restored or trained by a Trainer."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fpdt import FPDTPlugin, FPDTTrainer, apply_fpdt
from hf_fpdt.engine import layer
from hf_fpdt.memory.entries import DeviceEntry
from hf_fpdt.memory.streamed_kv import HostMemory, _PairEntry
from hf_fpdt.memory.transfers import Transfers
from hf_fpdt.model.apply import applied_settings
from hf_fpdt.plan.tiers import Budgets, BufferPool, TierAllocator
from tests.helpers.offloaded import (
    POLICIES,
    applied,
    assert_same_bits,
    budgets,
    least_host_bytes,
    model_of,
    sequences,
    sizes_of,
    step,
)
from tests.training.test_fpdt_trainer import trainer, training


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", [0, 60_000])
def test_too_little_memory_is_said_before_any_layer_runs(
    policy: str, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = model_of("llama"), sequences()
    least = least_host_bytes(policy, sizes_of(model), device)
    settings = {"checkpoints": policy, "device_budget_gib": device / 2**30}
    enough, handle = applied(model, **settings, host_budget_gib=least / 2**30)
    step(enough, data)
    assert handle.store.used_bytes()["pinned"] <= least
    ran: list[int] = []
    on_chunk = layer._on_chunk

    def noted(run: Any, *args: Any) -> Any:
        ran.append(run.layer.index)
        return on_chunk(run, *args)

    monkeypatch.setattr(layer, "_on_chunk", noted)
    short, handle = applied(model, **settings, host_budget_gib=(least - 1) / 2**30)
    with pytest.raises(MemoryError, match="Nothing was allocated") as refused:
        short(**data)
    assert not ran and handle.store.used_bytes()["pinned"] == 0
    assert ('checkpoints="segment"' in str(refused.value)) == (policy in ("attention", "input"))
    shorter = sequences(20)
    step(short, shorter)  # which fits


def test_remove_gives_everything_back_and_the_model_can_be_used_again(tmp_path: Path) -> None:
    model, data = model_of("llama"), sequences()
    sizes = sizes_of(model)
    results = []
    target = copy.deepcopy(model)
    for place in ("disk", "tight", "part"):
        settings = budgets(place, "segment", sizes, tmp_path)
        handle = apply_fpdt(target, FPDTPlugin(chunk_tokens=32, kernel="math", loss_chunk_tokens=50, **settings))
        results.append(step(target, data))
        tiers = handle.store._tiers.memory
        assert tiers is not None
        regions = [weakref.ref(region) for region in tiers.pinned._regions]
        assert regions
        handle.remove()
        del tiers
        gc.collect()
        assert handle.store.used_bytes() == {} and not any(region() is not None for region in regions)
        assert type(target) is type(model) and applied_settings(target) is None
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_a_copy_of_an_applied_model_trains_on_its_own(tmp_path: Path) -> None:
    model, data = model_of("neox"), sequences()
    for place in ("host", "disk"):
        ours, handle = applied(model, kernel="math", **budgets(place, "segment", sizes_of(model), tmp_path))
        exact = step(ours, data)
        loss = ours(**data).loss  # bytes in use are not copied
        twin = copy.deepcopy(ours)
        settings = applied_settings(twin)
        assert settings is not None and settings.store is not handle.store and settings.store.used_bytes() == {}
        twin_loss = twin(**data).loss
        loss.backward()
        twin_loss.backward()
        ours.zero_grad(), twin.zero_grad()
        handle.remove()
        assert_same_bits(step(twin, data), exact)
        assert not any(settings.store.used_bytes()[tier] for tier in ("device", "host", "disk"))


def test_a_freed_entry_lets_go_of_its_tensor() -> None:
    """The store may still list it among the reads to come."""
    allocator: TierAllocator[torch.Tensor] = TierAllocator(Budgets(1000, 0), BufferPool(torch.empty, 0))
    value = torch.zeros(10)
    place = allocator.place(40)
    assert place is not None
    entry, alive = DeviceEntry(value, place, allocator, "x"), weakref.ref(value)
    del value
    entry.free()
    assert alive() is None and allocator.used["device"] == 0


def test_a_chunk_without_room_for_its_values_gives_its_keys_room_back() -> None:
    pool = BufferPool(lambda size: torch.empty(size, dtype=torch.uint8), 4096)
    room = HostMemory(Transfers(torch.device("cpu")), TierAllocator(Budgets(0, 4096), pool))
    with pytest.raises(RuntimeError, match="no host memory is left for K and V"):
        _PairEntry(room, (torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)))
    assert pool.used_bytes == 0 < pool.nbytes


@pytest.mark.parametrize("checkpoints", ["segment", "attention"])
def test_trainer_logs_the_losses_of_training_without_offload(checkpoints: str, tmp_path: Path) -> None:
    logs: dict[str, Any] = {}
    budgets: dict[str, dict[str, Any]] = {"stays": {}, "goes": {"device_budget_gib": 0, "host_budget_gib": 1}}
    for name, more in budgets.items():
        plugin = FPDTPlugin(chunk_tokens=16, kernel="math", loss_chunk_tokens=24, checkpoints=checkpoints, **more)
        torch.manual_seed(0)
        run = trainer(tmp_path / name, FPDTTrainer, changes={"max_steps": 3}, fpdt_plugin=plugin)
        logs[name] = training(run)
        settings = applied_settings(run.model)
        assert settings is not None
        used = settings.store.used_bytes()
        assert (used["pinned"] > 0) == (name == "goes") and not used["host"]
    assert logs["stays"] == logs["goes"] and len(logs["goes"]) == 2 * 3 + 1
