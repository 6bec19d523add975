"""The first product of chosen experts kept for the backward pass: the bits without, and of the rows that it is of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_fpdt.model.experts.operation as operation
import hf_fpdt.model.experts.replace as replace
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory.checkpoints import LayerCheckpoint
from hf_fpdt.model.apply import FPDTHandle
from hf_fpdt.model.experts.replace import are_experts
from hf_fpdt.model.experts.routes import Routes
from hf_fpdt.model.shapes import SHAPES, build_random, with_layers
from hf_fpdt.model.shapes.build import training_of_model
from hf_fpdt.plan.checkpointing import forward_bytes
from hf_fpdt.plan.linears import under_way_bytes
from hf_fpdt.plan.placement import linear_share
from tests.helpers.kinds import with_adapters
from tests.helpers.models import tiny, tokens
from tests.helpers.offloaded import (
    Results,
    assert_linears_lie_as_planned,
    assert_same_bits,
    budgets,
    measured,
    sizes_of,
    step,
)
from tests.helpers.support import assert_rejects
from tests.model.test_experts import FAMILIES

IDS = tokens(2, 37)
DATA = {"input_ids": IDS, "labels": IDS}
NAMES = ("gpt_oss", "qwen3_moe", "deepseek_v3")
CHUNK = 10


def model_of(name: str, dtype: torch.dtype = torch.float32, *, adapters: bool = False) -> Any:
    model: Any = tiny(name, attention="eager", dtype=dtype, **FAMILIES[name])
    model.set_experts_implementation("grouped_mm")
    return with_adapters(model).to(dtype) if adapters else model


def run(model: Any, policy: str, **settings: Any) -> tuple[Results, FPDTHandle]:
    """Of a copy of the model."""
    model = copy.deepcopy(model)
    settings = {"chunk_tokens": CHUNK, "loss_chunk_tokens": 50, "checkpoints": policy, **settings}
    handle = apply_fpdt(model, FPDTPlugin(**settings))
    return step(model, DATA), handle


def kept_share(handle: FPDTHandle) -> float:
    """Of all linears, among which the experts must be."""
    (((sizes, _), plan),) = handle.store.plans.items()
    assert all(any(linear.name == "mlp.experts" for linear in layer) for layer in sizes.model.linears)
    return linear_share(plan.kept, sizes, range(plan.kept.layers))


class Products:
    """Rows that first products are made of, by the width of what comes out, and the tokens that get a value."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: dict[int, int] = {}
        self.valued = 0
        original, sums = operation._first_product, operation.sum_rows

        def counted(call: Any, x_TD: Tensor, first: Tensor) -> Tensor:
            self.rows[first.shape[-1]] = self.rows.get(first.shape[-1], 0) + len(call.routes.order_S)
            return original(call, x_TD, first)

        def summed(rows_SD: Tensor, routes: Routes, dtype: torch.dtype, *of_values: Any) -> Tensor:
            self.valued += len(routes.experts_TK) if of_values else 0
            return sums(rows_SD, routes, dtype, *of_values)

        patch.setattr(operation, "_first_product", counted)
        patch.setattr(operation, "sum_rows", summed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_has_the_same_bits_and_makes_no_product_twice(
    name: str, adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, gates, shared experts; every weight or adapters on experts; also where a hook reads the value."""
    for dtype in (torch.float32, torch.bfloat16):
        model, found = model_of(name, dtype, adapters=adapters), {}
        layers = len([module for module in model.modules() if are_experts(module)])
        for policy in ("attention", "linears"):
            with monkeypatch.context() as patch:
                products = Products(patch)
                found[policy], handle = run(model, policy)
            assert kept_share(handle) == float(policy == "linears")
            visits = layers * IDS.numel() * 2
            assert list(products.rows.values()) == [visits * (1 if policy == "linears" else 2)]
            assert products.valued == layers * IDS.numel(), (
                "nobody reads it in a replay, through PEFT's wrappers either"
            )
        assert_same_bits(found["linears"], found["attention"])


def test_a_value_that_a_hook_reads_is_made_of_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its square, of which the gradient needs the value."""
    model, found = model_of("qwen3_moe"), {}
    for module in model.modules():
        if are_experts(module):
            module.register_forward_hook(lambda module, args, output: output * output)
    for policy in ("attention", "linears"):
        with monkeypatch.context() as patch:
            products = Products(patch)
            found[policy], _ = run(model, policy)
        assert list(products.rows.values()) == [2 * IDS.numel() * 2 * (1 if policy == "linears" else 2)]
        assert products.valued == 2 * 2 * IDS.numel()
    assert_same_bits(found["linears"], found["attention"])


def test_under_autocast_products_in_fp32_take_their_own_bytes() -> None:
    """Weights in fp32 are multiplied as such, whatever autocast makes of linears."""
    for dtype in (torch.float32, torch.bfloat16):
        found, original = [], model_of("gpt_oss", dtype)
        for policy in ("attention", "linears"):
            model = copy.deepcopy(original)
            handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=50, checkpoints=policy))
            with measured() as bytes_kept, torch.autocast("cpu", torch.bfloat16):
                found.append(step(model, DATA))
            (((sizes, _), plan),) = handle.store.plans.items()
            held = bytes_kept.peak["host"] + bytes_kept.peak["device"]
            assert held == forward_bytes(plan.kept, sizes.layer_bytes())
        assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("place", ["host", "part", "tight"])
def test_every_place_has_the_bits_and_takes_what_was_predicted(place: str) -> None:
    model = model_of("qwen3_moe")
    exact, _ = run(model, "attention", kernel="math", chunk_tokens=32)
    settings = {"chunk_tokens": 32, **budgets(place, "linears", sizes_of(model, *IDS.shape[::-1]), None)}
    with measured() as bytes_kept:
        found, handle = run(model, settings.pop("checkpoints"), kernel="math", **settings)
    assert kept_share(handle) == 1.0
    assert_linears_lie_as_planned(handle, bytes_kept)
    assert_same_bits(found, exact)


def test_what_is_planned_from_a_configuration_is_what_a_model_keeps() -> None:
    for name in NAMES:
        model = model_of(name, torch.bfloat16)
        handle = apply_fpdt(copy.deepcopy(model), FPDTPlugin(chunk_tokens=CHUNK))
        first = next(p for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
        planned = training_of_model(model.to("meta"), lora=True).model
        assert handle._settings.sizes.linears == planned.linears
        (experts,) = (linear for linear in planned.linears[0] if linear.name == "mlp.experts")
        every = 2 * first[0].numel()  # of two experts
        assert experts.inputs * experts.outputs == every
        assert experts.output_bytes(8) == 2 * every // model.config.hidden_size


def test_experts_that_run_as_the_model_has_them_are_not_planned() -> None:
    model = model_of("qwen3_moe")
    for fused, way in ((False, "grouped_mm"), (True, "eager")):
        ours = copy.deepcopy(model)
        ours.set_experts_implementation(way)
        sizes = apply_fpdt(ours, FPDTPlugin(chunk_tokens=CHUNK, fused=fused))._settings.sizes
        assert not any("experts" in linear.name for layer in sizes.linears for linear in layer)


# -- routes ---------------------------------------------------------------------------------------------------------


class OtherInReplays:
    """One token of a replay goes to another expert than in the forward pass."""

    @staticmethod
    def of(experts_TK: Tensor, count: int) -> Routes:
        if torch.is_grad_enabled():
            experts_TK = experts_TK.clone()
            experts_TK[3, 1] = (set(range(count)) - set(experts_TK[3].tolist())).pop()
        return Routes.of(experts_TK, count)


def test_another_route_in_a_replay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check gradients are wrong in silence."""
    model = model_of("qwen3_moe")
    exact, _ = run(model, "attention")
    monkeypatch.setattr(replace, "Routes", OtherInReplays)
    with pytest.raises(RuntimeError, match="the router chose other experts when a layer was run again"):
        run(model, "linears")
    monkeypatch.setattr(replace, "_check_routes", lambda stamp, routes: None)
    assert_rejects(lambda policy: assert_same_bits(run(model, policy)[0], exact), {"unchecked": "linears"})


def test_broken_variants_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt_oss")
    exact, _ = run(model, "attention")
    put = LayerCheckpoint.put_linear

    def broken(change: Callable[[Tensor], Tensor]) -> Callable[[], Results]:
        def put_experts(self: LayerCheckpoint, name: str, chunk: Any, value: Tensor) -> None:
            put(self, name, chunk, change(value) if "experts" in name and chunk.index == 1 else value)

        def found() -> Results:
            with monkeypatch.context() as patch:
                patch.setattr(LayerCheckpoint, "put_linear", put_experts)
                return run(model, "linears")[0]

        return found

    def check(found: Callable[[], Results]) -> None:
        assert_same_bits(found(), exact)

    check(broken(lambda value: value))
    changes = {
        "of other rows": broken(lambda value: value.roll(1, 0)),
        "halves changed": broken(lambda v: v.roll(1, 1)),
    }
    assert_rejects(check, changes)


def test_every_change_of_routes_changes_their_stamp() -> None:
    """A token's expert, two that are swapped, one place further: other numbers, all of them."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(64, generator=generator)[:4] for _ in range(50)])
    stamps = {int(Routes.of(chosen, 64).stamp()), int(Routes.of(chosen.roll(1, 0), 64).stamp())}
    for token in range(50):
        for place in range(4):
            for other in (0, 1, 63, 64):
                changed = chosen.clone()
                changed[token, place] = other
                if not torch.equal(changed, chosen):
                    stamps.add(int(Routes.of(changed, 64).stamp()))
        stamps.add(int(Routes.of(torch.cat((chosen[:token], chosen[token:].flip(1))), 64).stamp()))
    equal = sum(int(chosen[t, p] == other) for t in range(50) for p in range(4) for other in (0, 1, 63, 64))
    assert len(stamps) == 2 + 50 * 4 * 4 - equal + 50
    assert Routes.of(chosen, 64).stamp() == Routes.of(chosen.clone().int(), 64).stamp()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_gpu_layers_have_the_same_bits_and_stay_within_their_plan(shape: str) -> None:
    """Two layers in bf16 over kernels of Triton and Liger, kept on the device and on the host."""
    config = with_layers(SHAPES[shape](), 2)
    config.vocab_size = 2048
    model = build_random(config, "cuda", torch.bfloat16, lora=True)
    ids = torch.randint(0, config.vocab_size, (1, 16_384), device="cuda")
    steps, on_host = [], {"device_budget_gib": 0, "host_budget_gib": 16}
    for settings in ({"checkpoints": "attention"}, {"checkpoints": "linears"}, {"checkpoints": "linears", **on_host}):
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=4096, kernel="math", **settings))
        step(model, {"input_ids": ids, "labels": ids})  # kernels compile
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps.append(step(model, {"input_ids": ids, "labels": ids}))
        peak = torch.cuda.max_memory_allocated() - before
        (((sizes, _), plan),) = handle.store.plans.items()
        assert kept_share(handle) == float(settings["checkpoints"] == "linears")
        predicted = sizes.working_bytes(plan.kv, resident=True) + plan.forecast.device_bytes
        predicted += under_way_bytes(plan.kept, sizes.layer_bytes())
        print(f"{shape}, {settings}: peak {peak / 2**30:.2f} of {predicted / 2**30:.2f}")
        assert peak <= 1.2 * predicted
        handle.remove()
    for kept in steps[1:]:
        assert_same_bits(kept, steps[0])
