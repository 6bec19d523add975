"""Outputs of linears kept for the backward pass: the bits of a step that makes them again, and none made again."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_fpdt.engine.trial
import hf_fpdt.model.apply
import hf_fpdt.model.fused
import hf_fpdt.model.fused_linear
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.calls import ReplayCall
from hf_fpdt.layout.documents import Documents
from hf_fpdt.memory.checkpoints import CheckpointStore, LayerCheckpoint
from hf_fpdt.model.apply import FPDTHandle
from hf_fpdt.model.shapes import build_random, llama_8b, with_layers
from hf_fpdt.plan.checkpointing import forward_bytes, linear_bytes
from hf_fpdt.plan.linears import under_way_bytes
from hf_fpdt.plan.placement import described, linear_share, plan_pass
from hf_fpdt.plan.tiers import Budgets
from tests.engine.test_layer import assert_equal, batch, with_lora
from tests.helpers import kinds, recurrent
from tests.helpers.linears import rows_multiplied
from tests.helpers.models import tiny as any_tiny
from tests.helpers.models import tokens
from tests.helpers.offloaded import (
    LAYERS,
    Results,
    applied,
    assert_same_bits,
    budgets,
    gradients,
    measured,
    model_of,
    sequences,
    sizes_of,
    step,
)
from tests.helpers.packed import positions
from tests.helpers.support import assert_rejects
from tests.helpers.truth import tiny, truth

CASES = ("llama", "llama+lora", "neox", "neox-sequential+lora")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def kept_share(handle: FPDTHandle) -> list[float]:
    plans = handle.store.plans.items()
    return [linear_share(plan.kept, sizes, range(plan.kept.layers)) for (sizes, _), plan in plans]


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_same_bits_and_makes_no_output_twice(case: str) -> None:
    """Over chunks, with dropout, in every dtype, over our pieces of a layer and over the model's own."""
    for dtype in DTYPES if "lora" in case else DTYPES[::2]:
        model, data = model_of(case, dropout=0.2, layers=2).to(dtype), sequences()
        for fused in (True, False):
            results, rows = {}, {}
            for policy in ("attention", "linears"):
                ours, handle = applied(model, checkpoints=policy, fused=fused)
                rows[policy] = rows_multiplied(ours, lambda: results.update({policy: step(ours, data)}))  # noqa: B023
                assert kept_share(handle) == [float(policy == "linears")]
                handle.remove()
            assert_same_bits(results["linears"], results["attention"])
            once = data["input_ids"].numel()
            assert set(rows["linears"].values()) == {once}, rows["linears"]
            assert sum(rows["attention"].values()) > 1.5 * once * len(rows["attention"])


def test_under_autocast_the_bits_are_the_same() -> None:
    for case in ("llama", "llama+lora"):
        model, data = model_of(case, dropout=0.2, layers=2).float(), sequences()
        results = []
        for policy in ("attention", "linears"):
            ours, handle = applied(model, checkpoints=policy)
            with torch.autocast("cpu", torch.bfloat16):
                results.append(step(ours, data))
            assert kept_share(handle) == [float(policy == "linears")]
        assert_same_bits(results[1], results[0])


def test_auto_is_the_plain_model_and_keeps_all_that_fits() -> None:
    model, data = model_of("llama+lora"), sequences()
    exact = truth(model, data["input_ids"], data["labels"])
    ours, handle = applied(model)
    assert_equal(step(ours, data), exact, 1e-10)
    assert kept_share(handle) == [1.0]


# -- where they lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "neox+lora"])
def test_every_place_has_the_bits_and_takes_what_was_predicted(case: str) -> None:
    model, data = model_of(case, dropout=0.2), sequences()
    sizes = sizes_of(model)
    plain, handle = applied(model, kernel="math", checkpoints="attention")
    exact = step(plain, data)
    handle.remove()
    for place in ("host", "part", "tight", "tight part"):
        ours, handle = applied(model, kernel="math", **budgets(place, "linears", sizes, None))
        for _ in range(2):  # in fresh buffers, and in used ones
            with measured() as bytes_kept:
                assert_same_bits(step(ours, data), exact)
            (plan,) = handle.store.plans.values()
            assert bytes_kept.peak["device"] == plan.forecast.device_bytes
            used = handle.store.used_bytes()
            assert used == {"device": 0, "host": 0, "disk": 0, "pinned": plan.forecast.host_bytes}
            held = bytes_kept.peak["host"] + bytes_kept.peak["device"]
            assert held == forward_bytes(plan.kept, sizes.layer_bytes())
        assert kept_share(handle) == [1.0] and linear_bytes(plan.kept, sizes.layer_bytes()).host > 0
        handle.remove()


def on_device(sizes: Any, share: float) -> dict[str, Any]:
    """A device that holds everything else and a share of what linears give, and no host."""
    every = plan_pass("linears", sizes, LAYERS, Budgets(2**40, 0))
    linears = linear_bytes(every.kept, sizes.layer_bytes()).device
    base = every.forecast.device_bytes - linears + every.kv.device_bytes
    return {"device_budget_gib": (base + share * linears) / 2**30, "host_budget_gib": 0}


def device_bytes(handle: FPDTHandle) -> float:
    return float(handle.plugin.device_budget_gib) * 2**30


def test_by_layer_and_chunk_what_fits_is_kept() -> None:
    model, data = model_of("llama+lora", dropout=0.2), sequences()
    sizes, seen = sizes_of(model), list[float]()
    plain, handle = applied(model, checkpoints="attention")
    exact = step(plain, data)
    handle.remove()
    for share in (0.0, 0.3, 0.7, 1.0):
        ours, handle = applied(model, **on_device(sizes, share))
        with measured() as bytes_kept:
            assert_same_bits(step(ours, data), exact)
        ((plan),) = handle.store.plans.values()
        assert bytes_kept.peak["device"] == plan.forecast.device_bytes
        assert plan.forecast.device_bytes + plan.kv.device_bytes <= device_bytes(handle)
        seen += kept_share(handle)
        handle.remove()
    assert seen[0] == 0 < seen[1] < seen[2] < seen[3] == 1
    parts = {chunks.kept for layer in plan.kept.linears for chunks in layer}
    assert parts == {4}


def test_random_lengths_in_a_row_never_take_more_than_the_budgets() -> None:
    model, rng, shares = model_of("llama", layers=2), random.Random(0), set[float]()
    device, host = 700_000, 500_000
    ours, handle = applied(model, device_budget_gib=device / 2**30, host_budget_gib=host / 2**30)
    for _ in range(200):
        data = sequences(rng.randrange(2, 150), rng.randrange(1, 3))
        with measured() as bytes_kept:
            step(ours, data)
        rows, n_tokens = data["input_ids"].shape
        plans = handle.store.plans.items()
        (plan,) = (plan for (at, _), plan in plans if (at.batch, at.plan.n_tokens) == (rows, n_tokens))
        assert bytes_kept.peak["device"] + plan.kv.device_bytes <= device
        assert handle.store.used_bytes()["pinned"] <= host
    shares.update(kept_share(handle))
    assert len(shares) > 3 and min(shares) < 0.4 < max(shares) == 1


def test_other_entries_get_the_room_where_they_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes before their backward passes: the second one's inputs go where the first one's linears were."""
    model = model_of("llama")
    data = [sequences(seed=1), sequences(seed=2)]
    exact = [truth(model, one["input_ids"], one["labels"]) for one in data]
    total = {name: exact[0][name] + exact[1][name] for name in exact[0]}

    def both() -> Results:
        ours, handle = applied(model, **on_device(sizes_of(model), 1.0))
        losses = [ours(**one).loss for one in data]
        held = handle.store.used_bytes()["device"]
        assert held <= device_bytes(handle)
        (losses[0] + losses[1]).backward()
        found = gradients(ours, losses[0] + losses[1])
        assert not any(handle.store.used_bytes()[tier] for tier in ("device", "host", "disk"))
        return found

    assert_equal(both(), total, 1e-10)
    monkeypatch.setattr(CheckpointStore, "_drop_linears", lambda store: False)
    with pytest.raises(MemoryError, match="no room"):
        both()
    gc.collect()


# -- every kind of layer --------------------------------------------------------------------------------------------


def families() -> dict[str, PreTrainedModel]:
    """Windows, sinks, experts, latents, blocks, scans, and a layer with attention and a scan."""
    found = {name: kinds.kind(name) for name in ("gpt_oss", "gemma2", "deepseek_v2", "llama4_text", "qwen2_moe")}
    for name in ("qwen3_next", "falcon_h1", "nemotron_h", "lfm2"):
        config = dict(recurrent.FAMILIES[name])
        experts = config.pop("experts_implementation", None)
        found[name] = any_tiny(name, attention="eager", **config)
        if experts is not None:
            found[name].set_experts_implementation(experts)
    return found


def both_ways(model: PreTrainedModel, chunk_tokens: int = 16, **inputs: Tensor) -> list[Results]:
    found = []
    for policy in ("attention", "linears"):
        ours = copy.deepcopy(model)
        handle = apply_fpdt(ours, FPDTPlugin(chunk_tokens=chunk_tokens, checkpoints=policy))
        torch.manual_seed(0)
        loss = ours(**inputs).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
        assert kept_share(handle) == [float(policy == "linears")]
    return found


def test_every_kind_of_layer_has_the_same_bits() -> None:
    ids = tokens(1, 40)
    for name, model in families().items():
        without, with_linears = both_ways(model, input_ids=ids, labels=ids)
        assert without.keys() == with_linears.keys(), name
        assert_same_bits(with_linears, without)


@pytest.mark.parametrize("way", ["layer", "scans"])
def test_packed_rows_have_the_same_bits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recurrent layer that goes through documents one by one nothing is kept; of one that runs on all, all."""
    if way == "layer":
        monkeypatch.setattr(hf_fpdt.engine.trial, "by_documents_of", lambda trial: "layer")
    ids, documents = tokens(1, 40), Documents.of_lengths((3, 25, 4, 8))
    for name in ("llama", "mamba2"):
        model = tiny("llama") if name == "llama" else any_tiny(name, attention="eager", **recurrent.FAMILIES[name])
        inputs = {"input_ids": ids, "labels": ids, "position_ids": positions(documents)}
        inputs = inputs if name == "llama" else inputs | {"seq_idx": seq_idx(documents)}
        without, with_linears = both_ways(model, 8, **inputs)
        assert_same_bits(with_linears, without)
        apply_fpdt(model, FPDTPlugin(chunk_tokens=8, checkpoints="linears"))
        once = partial(lambda model, inputs: model(**inputs).loss.backward(), model, inputs)
        once()  # documents are tried
        rows = set(rows_multiplied(model, once).values())
        assert rows == {40} if name == "llama" or way == "scans" else max(rows) > 40


def seq_idx(documents: Documents) -> Tensor:
    return torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(documents.lengths)])[None]


def test_what_a_layer_writes_to_is_not_kept() -> None:
    """OLMo clips q, k and v in place: what the linear gave is gone."""
    model, ids = any_tiny("olmo", clip_qkv=0.02), tokens(1, 40)
    without, with_linears = both_ways(model, input_ids=ids, labels=ids)
    assert_same_bits(with_linears, without)
    handle = apply_fpdt(copy.deepcopy(model), FPDTPlugin())
    names = {linear.name for linear in handle._settings.sizes.linears[0]}
    assert names == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"}
    without_clipping = apply_fpdt(any_tiny("olmo"), FPDTPlugin())
    assert len(without_clipping._settings.sizes.linears[0]) == 6


# -- what may go wrong ----------------------------------------------------------------------------------------------


def test_broken_variants_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of bits can fail: each of these bugs makes it."""
    model, data = model_of("llama"), [sequences(seed=1), sequences(seed=2)]
    plain, _ = applied(model, checkpoints="attention")
    exact = [step(plain, one) for one in data]

    def broken(owner: Any, **changes: Any) -> Callable[[], list[Results]]:
        def run() -> list[Results]:
            with monkeypatch.context() as patch:
                for name, value in changes.items():
                    patch.setattr(owner, name, value)
                ours, _ = applied(model, checkpoints="linears")
                return [step(ours, one) for one in data]

        return run

    def check(run: Callable[[], list[Results]]) -> None:
        for ours, expected in zip(run(), exact, strict=True):
            assert_same_bits(ours, expected)

    put, kept_output = LayerCheckpoint.put_linear, ReplayCall.kept_output
    first: dict[object, Tensor] = {}

    def of_another_chunk(self: LayerCheckpoint, name: str, chunk: Any, value: Tensor) -> None:
        put(self, name, chunk, value.roll(1, 1) if chunk.index == 1 else value)

    def of_another_linear(self: ReplayCall, name: str) -> Tensor | None:
        return kept_output(self, name.replace("gate", "Up").replace("up_", "gate_").replace("Up", "up"))

    def stale(self: LayerCheckpoint, name: str, chunk: Any, value: Tensor) -> None:
        key = self._pass.plan.kept.layers, id(self._pass.plan), name, chunk.index
        put(self, name, chunk, first.setdefault(key, value) if chunk.index < 3 else value)

    def half(dy: Tensor, x: Tensor, weight: Tensor, needed: Any) -> Any:
        dx, *others = gradients_of(dy, x, weight, needed)
        return None if dx is None else dx / 2, *others

    gradients_of = hf_fpdt.model.fused_linear._linear_gradients
    no_weight = lambda *args: (gradients_of(*args)[0], *(None,) * (len(args[3]) - 1))  # noqa: E731
    check(broken(LayerCheckpoint, put_linear=put))
    assert_rejects(
        check,
        {
            "of other tokens": broken(LayerCheckpoint, put_linear=of_another_chunk),
            "of another linear": broken(ReplayCall, kept_output=of_another_linear),
            "of the first step": broken(LayerCheckpoint, put_linear=stale),
            "half a gradient": broken(hf_fpdt.model.fused_linear, _linear_gradients=half),
        },
    )
    with pytest.raises(AssertionError):  # a weight without a gradient
        broken(hf_fpdt.model.fused_linear, _linear_gradients=no_weight)()


class InPlace:
    """Liger's rotary embedding overwrites what it is given; its other kernels are never asked on a CPU."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = [InPlace.rotated(x, cos, sin) for x in (q, k)]
        with torch.no_grad():
            for x, value in zip((q, k), rotated, strict=True):
                x.detach().data.copy_(value)  # as a kernel of Triton: autograd sees nothing of it
        return rotated[0], rotated[1]

    @staticmethod
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def test_what_is_kept_is_not_overwritten_by_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of("llama"), sequences()
    monkeypatch.setattr(hf_fpdt.model.fused.Rotary, "serves", lambda rotary, q, cos: True)
    monkeypatch.setattr(hf_fpdt.model.apply, "load_liger", InPlace)
    plain, handle = applied(model, checkpoints="attention")
    exact = step(plain, data)
    handle.remove()

    def check(kept: Callable[[], bool]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(hf_fpdt.model.fused, "_are_kept", kept)
            ours, handle = applied(model, checkpoints="linears")
            assert_same_bits(step(ours, data), exact)
            handle.remove()

    check(hf_fpdt.model.fused._are_kept)
    assert_rejects(check, {"overwritten": lambda: False})


@pytest.mark.parametrize("device", ["auto", 0])
def test_what_a_hook_writes_to_is_not_kept(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came after the plan was made: in the replay it writes to what is computed again."""
    model, data = model_of("llama"), sequences()

    def halve(module: Any, args: Any, output: Tensor) -> None:
        output.mul_(0.5)

    def halved(policy: str) -> Results:
        ours, _ = applied(model, checkpoints=policy, kernel="math", device_budget_gib=device)
        step(ours, data)
        ours.model.layers[1].mlp.up_proj.register_forward_hook(halve)
        return step(ours, data)

    exact = halved("attention")
    assert_same_bits(halved("linears"), exact)
    if device == "auto":  # to the host a CPU copies at once
        monkeypatch.setattr(Tensor, "_version", 0, raising=False)
        assert_rejects(lambda policy: assert_same_bits(halved(policy), exact), {"nobody looks": "linears"})


def test_a_linear_that_is_not_asked_for_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of("llama"), sequences()
    ours, handle = applied(model, checkpoints="linears")
    exact = step(ours, data)
    monkeypatch.setattr(ReplayCall, "kept_output", lambda call, name: None)
    held: list[int] = []
    for layer in handle._layers:
        layer.register_full_backward_hook(lambda *_: held.append(handle.store.used_bytes()["device"]))
    assert_same_bits(step(ours, data), exact)
    assert held == sorted(held, reverse=True) and held[-1] < held[0] / 3
    assert not handle.store.used_bytes()["device"]


def test_a_hook_sees_values_in_a_replay() -> None:
    model, (ids, labels) = with_lora(tiny("llama")), batch(64, 1)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=32, checkpoints="linears"))
    seen: list[Tensor] = []
    layer = model.base_model.model.model.layers[0]
    layer.mlp.up_proj.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    model(input_ids=ids, labels=labels).loss.backward()
    forward, replay = seen[-4:-2], seen[-2:][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forward, replay, strict=True))
    handle.remove()


class Line:
    """In place of the line inside long steps."""

    def __init__(self, peak: float | None) -> None:
        self.total, self.done = 0.0, 0.0

    def begin(self, total: float) -> None:
        self.total, self.done = total, 0.0

    def advance(self, done: float, strict: float, what: str) -> None:
        self.done += done

    def close(self) -> None:
        """Nothing to do."""


def test_progress_ends_at_its_end_and_counts_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_fpdt.model.apply, "StepProgress", Line)
    model, data, totals = model_of("llama"), sequences(), dict[str, float]()
    for policy in ("attention", "linears"):
        ours, handle = applied(model, checkpoints=policy, progress=True)
        step(ours, data)
        line: Any = handle._settings.progress
        assert line.done == pytest.approx(line.total)
        totals[policy] = line.total
        ((sizes, _),) = handle.store.plans
        handle.remove()
    again = sum(linear.inputs * linear.outputs for linear in sizes.model.linears[0])
    assert totals["attention"] - totals["linears"] == pytest.approx(2.0 * data["input_ids"].numel() * LAYERS * again)


def test_what_a_plan_says_of_them() -> None:
    model, data = model_of("llama"), sequences()
    ours, handle = applied(model, checkpoints="linears")
    step(ours, data)
    ((sizes, _), plan), *_ = handle.store.plans.items()
    text = described(plan, sizes, Budgets(0, 0))
    assert "5 attention outputs of 5 layers and 100 % of what linears gave" in text
    assert under_way_bytes(plan.kept, sizes.layer_bytes()) == 0


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [True, False])
def test_gpu_an_8b_layer_has_the_same_bits_and_stays_within_its_plan(lora: bool) -> None:
    """Two layers of Llama-3.1-8B's shape in bf16 over Liger's kernels, kept on the device and on the host."""
    config = with_layers(llama_8b(), 2)
    model = build_random(config, "cuda", torch.bfloat16, lora=lora)
    ids = torch.randint(0, config.vocab_size, (1, 16_384), device="cuda")
    results: list[Results] = []
    for settings in ({"checkpoints": "attention"}, {"checkpoints": "linears"}, {"device_budget_gib": 2.0}):
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=4096, kernel="math", **settings))
        model(input_ids=ids[:, :4096], labels=ids[:, :4096]).loss.backward()  # kernels compile
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results.append(step(model, {"input_ids": ids, "labels": ids}))
        peak = torch.cuda.max_memory_allocated() - before
        sizes, plan = max(
            ((sizes, plan) for (sizes, _), plan in handle.store.plans.items()), key=lambda pair: pair[0].plan.n_tokens
        )
        share = linear_share(plan.kept, sizes, range(2))
        predicted = sizes.working_bytes(plan.kv, resident=True) + plan.forecast.device_bytes
        predicted += under_way_bytes(plan.kept, sizes.layer_bytes())
        print(f"lora {lora}, {settings}: {100 * share:.0f} % kept, peak {peak / 2**30:.2f} of {predicted / 2**30:.2f}")
        assert (share > 0) == (settings != {"checkpoints": "attention"})
        # Where every weight trains its gradients come while checkpoints go.
        assert not lora or peak <= 1.03 * predicted
        handle.remove()
    for kept in results[1:]:
        assert_same_bits(kept, results[0])
