"""Outputs of linears of bitsandbytes kept for the backward pass: the bits without, and no product made twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

import hf_fpdt.model.fused_linear
import hf_fpdt.model.weights.whole as whole
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory.checkpoints import LayerCheckpoint
from hf_fpdt.model.apply import FPDTHandle
from hf_fpdt.model.shapes.build import training_of_model
from hf_fpdt.plan.placement import linear_share
from tests.helpers.linears import rows_multiplied
from tests.helpers.models import tokens
from tests.helpers.offloaded import (
    Results,
    assert_linears_lie_as_planned,
    assert_same_bits,
    budgets,
    measured,
    sizes_of,
    step,
)
from tests.helpers.quantised import counting, linears, tiny_plain, tiny_quantised
from tests.helpers.support import assert_rejects

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")
IDS = tokens(2, 37)
DATA = {"input_ids": IDS, "labels": IDS}
# Dtypes of everything else, of products of 4 bits, and of adapters.
DTYPES = (
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
)


def made(kind: str, *, adapters: torch.dtype | None, family: str = "llama", prepared: bool = False, **how: Any) -> Any:
    """A model made anew, as int8 loses its weights when it is copied."""
    torch.manual_seed(0)
    model: Any = tiny_quantised(family, kind, **how)
    model = prepare_model_for_kbit_training(model) if prepared else model
    return model if adapters is None else with_adapters(model, adapters, dropout=0.2 if family == "llama" else 0.0)


def with_adapters(model: Any, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """Of random values, the same whatever is below them."""
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).mul_(0.2).to(dtype)
    return model


def run(model: Any, policy: str, *, autocast: bool = False, **settings: Any) -> tuple[Results, FPDTHandle]:
    settings = {"chunk_tokens": 10, "loss_chunk_tokens": 50, "checkpoints": policy, **settings}
    handle = apply_fpdt(model, FPDTPlugin(**settings))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return step(model, DATA), handle


def kept_share(handle: FPDTHandle) -> float:
    """Of what the base's linears compute again; adapters are none of them."""
    (((sizes, _), plan),) = handle.store.plans.items()
    assert not any("lora_" in linear.name for layer in sizes.model.linears for linear in layer)
    return linear_share(plan.kept, sizes, range(plan.kept.layers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
def test_a_step_has_the_same_bits_and_makes_no_output_twice(
    kind: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K and V of earlier chunks too; over dropout, pieces of ours and PEFT's own, wider and narrower products."""
    calls: list[Any] = []
    monkeypatch.setattr(whole, "dequantised", counting(whole.dequantised, calls))
    for dtype, compute, adapters in DTYPES if kind == "nf4" else DTYPES[:2]:
        for fused in (True, False):
            results, rows = {}, {}
            for policy in ("attention", "linears"):
                model = made(kind, dtype=dtype, compute=compute, adapters=adapters if lora else None)
                _, handle = run(model, policy, fused=fused)
                calls.clear()
                rows[policy] = rows_multiplied(model, lambda: results.update({policy: step(model, DATA)}))  # noqa: B023
                assert len(calls) == 2 * len(linears(model)), "once forward and once backward, kept or not"
                assert kept_share(handle) == float(policy == "linears")
            assert_same_bits(results["linears"], results["attention"])
            once = dict.fromkeys(rows["linears"], IDS.numel())
            if lora and fused and len({dtype, compute, adapters}) > 1:  # PEFT's own code reads the last product
                once |= {name: 2 * IDS.numel() for name in once if "down_proj" in name}
            assert len(once) == 14 and rows["linears"] == once
            assert sum(rows["attention"].values()) > 1.5 * 14 * IDS.numel()


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe", "qwen3_5_text"])
def test_other_layers_have_the_same_bits(family: str) -> None:
    """Biases; beside experts, which are not quantised; scans."""
    results = []
    for policy in ("attention", "linears"):
        model = made("nf4", family=family, adapters=torch.float64)
        found, handle = run(model, policy, chunk_tokens=16)
        results.append(found)
        assert kept_share(handle) == float(policy == "linears")
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("prepared", [True, False])
def test_under_autocast_and_prepared_the_bits_are_the_same(prepared: bool) -> None:
    """fp32 hidden states, products in bf16; without autocast PEFT's own code runs over adapters in fp32."""
    how: dict[str, Any] = {"dtype": torch.bfloat16 if prepared else torch.float32, "compute": torch.bfloat16}
    for autocast in (True, False) if prepared else (True,):
        results = []
        for policy in ("attention", "linears"):
            model = made("nf4", adapters=torch.float32, prepared=prepared, **how)
            found, handle = run(model, policy, autocast=autocast)
            results.append(found)
            assert kept_share(handle) == float(policy == "linears")
        assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("place", ["host", "part", "tight"])
def test_every_place_has_the_bits_and_takes_what_was_predicted(place: str) -> None:
    exact, _ = run(made("nf4", adapters=torch.float64), "attention", kernel="math", chunk_tokens=32)
    sizes = sizes_of(made("nf4", adapters=torch.float64), *IDS.shape[::-1])
    model = made("nf4", adapters=torch.float64)
    settings: dict[str, Any] = {"chunk_tokens": 32, **budgets(place, "linears", sizes, None)}
    with measured() as bytes_kept:
        found, handle = run(model, settings.pop("checkpoints"), kernel="math", **settings)
    assert kept_share(handle) == 1.0
    assert_linears_lie_as_planned(handle, bytes_kept)
    assert_same_bits(found, exact)


def test_weights_on_the_host_have_the_same_bits() -> None:
    results = []
    for policy in ("attention", "linears"):
        model: Any = tiny_quantised("llama", "nf4")
        handle = apply_fpdt(
            model, FPDTPlugin(chunk_tokens=10, loss_chunk_tokens=50, checkpoints=policy, host_weights=True)
        )
        results.append(step(with_adapters(model, torch.float64), DATA))
        assert kept_share(handle) == float(policy == "linears")
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planned_from_a_configuration_is_what_a_quantised_model_keeps(kind: str) -> None:
    """`hf-fpdt plan --quantize` sees the linears of a model that is not quantised, and has no memory."""
    for family in ("llama", "qwen3_moe"):
        model = made(kind, adapters=None, family=family, dtype=torch.bfloat16)
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=10))
        bare = tiny_plain(family, torch.bfloat16).to("meta")
        planned = training_of_model(bare, lora=True, quantised=kind).model
        assert handle._settings.sizes.linears == planned.linears and any(planned.linears)


def test_broken_variants_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"dtype": torch.float32, "compute": torch.bfloat16, "adapters": None}
    exact, _ = run(made("nf4", **how), "attention")

    def broken(owner: Any, **changes: Any) -> Callable[[], Results]:
        def found() -> Results:
            with monkeypatch.context() as patch:
                for name, value in changes.items():
                    patch.setattr(owner, name, value)
                return run(made("nf4", **how), "linears")[0]

        return found

    put, gradients_of = LayerCheckpoint.put_linear, hf_fpdt.model.fused_linear._linear_gradients

    def of_other_tokens(self: LayerCheckpoint, name: str, chunk: Any, value: Tensor) -> None:
        put(self, name, chunk, value.roll(1, 1) if chunk.index == 1 else value)

    def without_the_weight(dy: Tensor, x: Tensor, weight: Tensor, needed: Any) -> Any:
        return gradients_of(dy, x, weight.roll(1, 0), needed)

    def check(found: Callable[[], Results]) -> None:
        assert_same_bits(found(), exact)

    check(broken(LayerCheckpoint, put_linear=put))
    assert_rejects(
        check,
        {
            "of other tokens": broken(LayerCheckpoint, put_linear=of_other_tokens),
            "another weight": broken(hf_fpdt.model.fused_linear, _linear_gradients=without_the_weight),
        },
    )
