"""What a step may hold where: "auto" resolved, the fastest plan that fits, and a refusal before anything ran."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.memory.available import available
from hf_fpdt.plan.checkpointing import KeptLayers, least_bytes, peak_bytes
from hf_fpdt.plan.layer_bytes import LayerBytes
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.placement import Available, budgets_of, described, described_kv, plan_pass
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import STAGING_BUFFERS, Budgets
from hf_fpdt.units import GIB
from tests.helpers.models import assert_same_step, tiny, tokens, train_step
from tests.helpers.stores import CPU, NO_LIMIT, TINY, step_of
from tests.helpers.support import assert_rejects

K = 1024
LLAMA = ModelSizes(32, 4096, 14336, 32, 8, 128, 128, 218_112_000)
LONG = StepSizes(LLAMA, ChunkPlan(128 * K, 32 * K))
THERE = Available(device=100 * GIB, host=200 * GIB, disk=0)
UNITS = {"GiB": GIB, "MiB": 2**20}


def numbers(text: str) -> list[float]:
    """Every amount of bytes in a message."""
    return [float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (GiB|MiB)", text)]


def refusal(policy: str, step: StepSizes, layers: int, budgets: Budgets) -> str:
    with pytest.raises(MemoryError) as raised:
        plan_pass(policy, step, layers, budgets)
    return str(raised.value)


@pytest.mark.parametrize("policy", ["attention", "input", "segment", "auto"])
def test_a_refusal_has_the_arithmetic_and_the_ways_out(policy: str) -> None:
    budgets = Budgets(device=0, host=3 * GIB)
    text, sizes = refusal(policy, LONG, 32, budgets), LONG.layer_bytes()
    kv = LONG.kv_bytes(0)
    expected = [sizes.input_total, sizes.attention_total, kv.host_bytes, 0, 3 * GIB, 3 * GIB]
    if policy in ("attention", "input"):
        expected.append(least_bytes("segment", 32, sizes))
    needed, *others = numbers(text)
    assert others == pytest.approx(expected, abs=0.0051 * GIB)
    least = least_bytes(policy, 32, sizes)
    assert least - 0.0051 * GIB <= needed <= 1.02 * least, "buffers are hardly longer than what lies in them"
    assert needed + kv.host_bytes > 3 * GIB, "what is needed is more than what there is"
    enough = Budgets(0, int(needed + 0.0051 * GIB) + kv.host_bytes)
    assert plan_pass(policy, LONG, 32, enough).kept.layers == 32
    for way in (
        "Nothing was allocated",
        "device_budget_gib",
        "host_budget_gib",
        "disk_dir",
        "fewer tokens",
        "sp_size",
    ):
        assert way in text
    assert ('checkpoints="segment"' in text) == (policy in ("attention", "input"))
    assert "131,072 tokens" in text and f"checkpoints={policy!r} (32 layers" in text


@pytest.mark.parametrize("policy", ["attention", "input", "segment", "auto"])
def test_on_the_device_what_a_refusal_asks_for_is_enough(policy: str) -> None:
    resident = LONG.kv_bytes(NO_LIMIT).device_bytes
    needed = resident + least_bytes(policy, 32, LONG.layer_bytes())
    predicted = plan_pass(policy, LONG, 32, Budgets(needed, 0)).forecast
    assert predicted is not None and predicted.device_bytes == needed - resident and not predicted.host_bytes
    refusal(policy, LONG, 32, Budgets(needed - 1, 0))


def count_calls(model: Any) -> list[str]:
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_a_step_that_does_not_fit_is_refused_before_any_layer_ran() -> None:
    model = tiny(dtype=torch.float32)
    calls = count_calls(model)
    small = FPDTPlugin(chunk_tokens=8, device_budget_gib=0, host_budget_gib=1e-5)
    handle = apply_fpdt(model, small)
    calls.clear()  # those of the layers' trial
    ids = tokens(1, 20)
    with pytest.raises(MemoryError, match="Nothing was allocated"):
        model(input_ids=ids, labels=ids)
    assert not calls and handle.store.used_bytes()["pinned"] == 0
    handle.remove()
    apply_fpdt(model, replace(small, host_budget_gib=0.01))
    model(input_ids=ids, labels=ids).loss.backward()
    assert calls


def test_auto_is_without_limit_on_a_cpu_and_leaves_working_memory_on_a_gpu() -> None:
    there = available(FPDTPlugin(), CPU, training_bytes=5 * GIB, step_bytes=GIB)
    assert there.device >= NO_LIMIT and there.disk == 0
    assert budgets_of(FPDTPlugin(), LONG, there).device >= NO_LIMIT
    assert budgets_of(FPDTPlugin(), LONG, there).host == there.host
    on_gpu = budgets_of(FPDTPlugin(), LONG, THERE)
    working = LONG.working_bytes(LONG.kv_bytes(NO_LIMIT))
    assert on_gpu.device == int(99 * GIB - 1.10 * working) and on_gpu.host == 200 * GIB
    assert budgets_of(FPDTPlugin(), LONG, replace(THERE, device=GIB)).device == 0, "never below zero"


def test_what_a_step_has_on_the_device_already_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free, training = 60 * GIB, 2 * GIB
    gpu = torch.device("cuda")

    def measured(n_tokens: int, *, counted_twice: bool = False) -> int:
        step = StepSizes(LLAMA, ChunkPlan(n_tokens, 32 * K))
        embeddings, cos_sin, ids = 4096 * 2, 2 * 128 * 2, 4 * 8
        there = n_tokens * (embeddings + cos_sin + ids)
        monkeypatch.setattr("hf_fpdt.memory.available.device_bytes_available", lambda _: free - there)
        return available(FPDTPlugin(), gpu, training, 0 if counted_twice else step.entry_bytes).device

    def check(wrong: bool) -> None:
        for n_tokens in (K, 128 * K, 768 * K):
            assert measured(n_tokens, counted_twice=wrong) == free - training

    check(False)
    assert_rejects(check, {"the first step's length counts": True})


def test_a_first_pass_says_what_it_and_training_take(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []

    def noted(plugin: FPDTPlugin, device: torch.device, training_bytes: int, step_bytes: int) -> Available:
        said.append((training_bytes, step_bytes))
        return available(plugin, device, training_bytes, step_bytes)

    monkeypatch.setattr("hf_fpdt.memory.device_tiers.available", noted)
    model, ids = tiny(dtype=torch.float32), tokens(1, 40)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=8))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    ((training, there),) = said
    (step,) = {step for step, _ in handle.store.plans}
    assert there == step.entry_bytes > ids.numel() * 32 * 4
    assert training > 3 * 4 * sum(p.numel() for p in model.parameters()), "gradients and AdamW's two states"


def test_numbers_that_were_given_are_kept(tmp_path: Any) -> None:
    plugin = FPDTPlugin(device_budget_gib=1.5, host_budget_gib=0.25)
    for there in (THERE, Available(0, 0, 0)):
        assert budgets_of(plugin, LONG, there) == Budgets(GIB * 3 // 2, GIB // 4)
    assert available(FPDTPlugin(disk_dir=str(tmp_path)), CPU, 0, 0).disk > 0


def test_processes_of_a_machine_share_its_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fpdt.memory.available.free_bytes", lambda folder: 1000)
    for count, share in ((None, 1000), ("8", 125)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if count is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert available(FPDTPlugin(disk_dir=str(tmp_path)), CPU, 0, 0).disk == share


def assert_fewest_reruns(policy: str) -> None:
    """Every budget from the least to plenty: attention runs again as seldom as at all."""
    step = step_of(4096, 1024, model=replace(TINY, layers=5))  # long beside its linears: attention is what costs
    sizes = step.layer_bytes()
    resident, most = step.kv_bytes(NO_LIMIT).device_bytes, 5 * (sizes.input_total + sizes.attention_total)
    reruns = []
    for budget in range(least_bytes("auto", 5, sizes), most + 1, 50_000):
        fits = [n for n in range(6) if any_plan_keeps(n, sizes, budget)]
        plan = plan_pass(policy, step, 5, Budgets(resident + budget, 0))
        assert peak_bytes(plan.kept, sizes) <= budget
        assert plan.kept.attention_reruns == 5 - max(fits)
        reruns.append(plan.kept.attention_reruns)
    assert reruns == sorted(reruns, reverse=True) and reruns[0] == 5
    assert plan_pass(policy, step, 5, Budgets(resident + most, 0)).kept.attention_reruns == 0


def any_plan_keeps(outs: int, sizes: LayerBytes, budget: int) -> bool:
    row = tuple(layer >= 5 - outs for layer in range(5))
    return any(
        peak_bytes(KeptLayers((True, *rest), row), sizes) <= budget for rest in product((True, False), repeat=4)
    )


def test_auto_runs_attention_again_as_seldom_as_the_budget_allows() -> None:
    assert_fewest_reruns("auto")
    assert_rejects(assert_fewest_reruns, {"no attention outputs": "segment"})


def test_of_a_pass_without_backward_it_says_where_k_and_v_lie() -> None:
    assert described_kv(LONG.kv_bytes(0), LONG) == "131,072 tokens in 4 chunks: K, V of 0 chunks on the device"


def test_resident_keys_are_taken_off_the_device_budget_and_staging_off_the_host() -> None:
    plan = plan_pass("attention", LONG, 32, Budgets(10 * GIB, 100 * GIB, 0))
    assert plan.kv.backward_resident == 4 and plan.budgets.device == 10 * GIB - plan.kv.device_bytes
    files = plan_pass("attention", LONG, 32, Budgets(10 * GIB, 100 * GIB, GIB))
    assert files.budgets.host == 100 * GIB - 7 * LONG.layer_bytes().longest
    text = described(plan, LONG, Budgets(10 * GIB, 100 * GIB))
    assert "keeps 32 inputs and 32 attention outputs of 32 layers (64.50 GiB" in text
    assert "budgets device 10.00 GiB, host 100.00 GiB" in text
    total = plan.forecast.device_bytes + plan.forecast.host_bytes
    assert 64.5 * GIB <= total <= 66 * GIB


@pytest.mark.parametrize("host", [4, 10, 20, 40, 60])
def test_files_take_what_the_host_cannot_hold_beside_streamed_keys(host: int) -> None:
    predicted = plan_pass("attention", LONG, 32, Budgets(0, host * GIB, 1000 * GIB)).forecast
    assert (
        predicted is not None
        and predicted.disk_bytes > 0
        and predicted.host_bytes <= host * GIB - 7 * LONG.layer_bytes().longest
    )
    # The host is full but for staging, for what K and V need, and for short entries in longer buffers.
    assert predicted.disk_bytes <= (64.5 - (host - 1.75 - 0.875) + 4) * GIB


def test_a_step_over_all_tiers_is_exact_and_takes_what_was_predicted(tmp_path: Any) -> None:
    model, ids = tiny(num_hidden_layers=4), tokens(1, 44)
    truth = train_step(model, ids)
    host = (7 * 2048 + 60 * 4096) / GIB
    plugin = FPDTPlugin(
        chunk_tokens=8,
        checkpoints="attention",
        device_budget_gib=4000 / GIB,
        host_budget_gib=host,
        disk_dir=str(tmp_path),
    )
    store = apply_fpdt(model, plugin).store
    for _ in range(2):
        assert_same_step(train_step(model, ids), truth)
        predicted = next(plan.forecast for plan in store.plans.values())
        assert predicted.disk_bytes > 0 and predicted.host_bytes > 0
        assert store.used_bytes() == {"device": 0, "host": 0, "disk": 0, "pinned": predicted.host_bytes}


def test_a_refusal_says_what_the_host_must_hold_although_there_are_files() -> None:
    budgets = Budgets(device=0, host=GIB, disk=1000 * GIB)
    kv, sizes = LONG.kv_bytes(0), LONG.layer_bytes()
    on_host = kv.host_bytes + STAGING_BUFFERS * sizes.longest
    assert on_host > GIB
    found = re.search(r"of it ([\d.]+) GiB on the host, whatever files hold", refusal("input", LONG, 32, budgets))
    assert found and float(found[1]) * GIB == pytest.approx(on_host, abs=0.0051 * GIB)
