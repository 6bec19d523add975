"""LoRA in one node and products that nobody reads: PEFT's results, and PEFT's own code wherever it must run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_fpdt.model.fused_linear
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.sizes import StepSizes
from tests.engine.test_layer import assert_equal, batch, with_fpdt, with_lora
from tests.helpers import recurrent
from tests.helpers.linears import rows_through
from tests.helpers.models import assert_same_step, tokens, train_step
from tests.helpers.models import tiny as any_tiny
from tests.helpers.offloaded import least_host_bytes
from tests.helpers.support import assert_as_accurate, assert_rejects
from tests.helpers.truth import in_double, loss_and_gradients, tiny, truth

RANK, WIDTHS, TOKENS = 4, (48, 80), (2, 33)


class OneLinear(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(*WIDTHS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def lora_linear(dtype: torch.dtype, *, bias: bool = False, **config: Any) -> Any:
    """A PEFT linear as get_peft_model makes it, in training mode."""
    torch.manual_seed(0)
    config = {"r": RANK, "lora_alpha": 3, "init_lora_weights": False, **config}
    model = get_peft_model(OneLinear(bias), LoraConfig(target_modules=["linear"], **config))
    return model.to(dtype).train().base_model.model.linear


def results(layer: nn.Module, forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every adapter."""
    torch.manual_seed(1)
    x = torch.randn(*TOKENS, WIDTHS[0]).to(dtype).requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = forward(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy)
    return {"y": y.detach(), **dict(zip(("x", *trained), grads, strict=True))}


@pytest.fixture
def patched() -> Callable[..., Any]:
    """A function that gives a PEFT linear the forward FPDT gives those of a model."""
    settings = applied(tiny("llama"))._settings

    def patch(layer: Any) -> Any:
        hf_fpdt.model.fused_linear.patch_linear(layer, settings)
        return layer

    return patch


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our autograd functions, as they are called."""
    calls: list[str] = []
    for kind in (hf_fpdt.model.fused_linear._LoRALinear, hf_fpdt.model.fused_linear._UnreadLinear):
        original = kind.forward

        def forward(ctx: Any, *args: Any, original: Any = original, name: str = kind.__name__) -> Tensor:
            calls.append(name)
            return original(ctx, *args)

        monkeypatch.setattr(kind, "forward", staticmethod(forward))
    return calls


def applied(model: PreTrainedModel, **settings: Any) -> Any:
    return apply_fpdt(model, FPDTPlugin(chunk_tokens=32, **settings))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_as_accurate_as_pefts(
    dtype: torch.dtype, bias: bool, patched: Any, fused_calls: list[str]
) -> None:
    layer = lora_linear(dtype, bias=bias)
    wide = lora_linear(dtype, bias=bias).double()
    exact = results(wide, wide, torch.float64)
    naive = results(layer, layer, dtype)
    ours = results(layer, patched(layer), dtype)
    assert fused_calls == ["_LoRALinear"]

    def check(found: dict[str, Tensor]) -> None:
        for name, truth_ in exact.items():
            assert_as_accurate(found[name], naive[name], truth_, name=name)

    check(ours)
    scaling, layer.scaling["default"] = layer.scaling["default"], 1.0
    unscaled = results(layer, layer, dtype)
    layer.scaling["default"] = scaling
    assert_rejects(check, {"no scaling": unscaled, "half a gradient": {**ours, "x": ours["x"] / 2}})


def test_dropout_has_pefts_masks(patched: Any, fused_calls: list[str]) -> None:
    layer = lora_linear(torch.float64, lora_dropout=0.4)
    exact, ours = results(layer, layer, torch.float64), results(layer, patched(layer), torch.float64)
    assert fused_calls == ["_LoRALinear"]
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


def test_autocast_computes_in_its_dtype(patched: Any, fused_calls: list[str]) -> None:
    """As accurate as PEFT under autocast, with weights and adapters in fp32; gradients come in fp32."""
    layer = lora_linear(torch.float32, bias=True)
    wide = lora_linear(torch.float32, bias=True).double()
    exact = results(wide, wide, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        naive, ours = results(layer, layer, torch.float32), results(layer, patched(layer), torch.float32)
    assert fused_calls == ["_LoRALinear"]
    for name, expected in exact.items():
        assert_as_accurate(ours[name], naive[name], expected, name=name)


def _disable(layer: Any) -> None:
    layer.enable_adapters(False)


def _two_adapters(layer: Any) -> None:
    layer.update_layer("other", RANK, lora_alpha=1, config=LoraConfig(r=RANK, init_lora_weights=False))
    layer.set_adapter(["default", "other"])


def _train_base(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def _hook(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


PEFTS_OWN: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "adapters off": ({}, _disable),
    "merged": ({}, lambda layer: layer.merge()),
    "two adapters": ({}, _two_adapters),
    "base trained": ({}, _train_base),
    "hook on an adapter": ({}, _hook),
    "DoRA": ({"use_dora": True}, lambda layer: None),
    "bias in the adapter": ({"lora_bias": True}, lambda layer: None),
}


@pytest.mark.parametrize("case", PEFTS_OWN)
def test_what_is_more_than_one_plain_adapter_is_pefts_own(case: str, patched: Any, fused_calls: list[str]) -> None:
    config, change = PEFTS_OWN[case]
    layer = lora_linear(torch.float64, **config)
    change(layer)
    x = torch.randn(*TOKENS, WIDTHS[0], dtype=torch.float64)
    exact, plain = layer(x), nn.functional.linear(x, layer.base_layer.weight)
    assert torch.equal(patched(layer)(x), exact) and not fused_calls
    if case not in ("adapters off", "merged"):
        assert not torch.allclose(exact, plain)


def test_wider_adapters_without_autocast_are_pefts_own_and_said_once(
    patched: Any, fused_calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    hf_fpdt.model.fused_linear._say_not_fused.cache_clear()
    layer = lora_linear(torch.float32)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(*TOKENS, WIDTHS[0], dtype=torch.bfloat16)
    exact, forward = layer(x), patched(layer)
    with torch.autocast("cpu", torch.bfloat16):
        forward(x)
    assert len(fused_calls) == 1 and not caplog.text
    assert torch.equal(exact, forward(x)) and torch.equal(exact, forward(x)) and len(fused_calls) == 1
    (said,) = caplog.messages
    assert "adapters are float32, a layer's input is bfloat16" in said and "bf16=True" in said


# -- products that nobody reads ---------------------------------------------------------------------------------------

UNREAD = {"llama": 1, "neox": 2, "neox-sequential": 1}  # a layer's linears whose value is only added to its output


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", UNREAD)
def test_a_replay_leaves_out_what_nobody_reads(family: str, lora: bool, fused_calls: list[str]) -> None:
    """Fresh memory is NaN in tests, so a value that is read after all shows in loss or gradients."""
    model, (ids, labels) = in_double(tiny(family)), batch(100, 2)
    model = with_lora(model) if lora else model
    ours = with_fpdt(model, ids, labels, chunk_tokens=32)
    assert_equal(ours, truth(model, ids, labels), 1e-10)
    chunks, layers = 4, 2
    if not lora:
        assert fused_calls == ["_UnreadLinear"] * (UNREAD[family] * chunks * layers)


# Tokens of 64 in two chunks that q is made of; q of Cohere's own rotary embedding is no known one, KDA has others.
MADE_Q = {"granite": 128, "cohere2": 160, "qwen3_5_text": 128, "kimi_linear": None}


@pytest.mark.parametrize("name", MADE_Q)
def test_layers_of_many_kinds_leave_it_out(name: str) -> None:
    """Scaled, beside attention, after a recurrence; q with its gate where K and V alone are made again."""
    model, ids = any_tiny(name, **recurrent.FAMILIES.get(name, {})), tokens(1, 64)
    modules = {f"down {index}": layer.mlp.down_proj for index, layer in enumerate(model.model.layers)}
    forward = dict.fromkeys(modules, 64)
    if MADE_Q[name] is not None:
        modules["q"] = model.model.layers[-1].self_attn.q_proj
    steps, rows = {}, {}
    for fused in (False, True):
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=32, fused=fused, checkpoints="attention"))
        rows[fused] = rows_through(modules, lambda: steps.update({fused: train_step(model, ids)}))  # noqa: B023
        handle.remove()
    assert_same_step(steps[True], steps[False], 1e-6)
    # Forward and replay; q also with K, V of the first chunk.
    q, every = MADE_Q[name], dict.fromkeys(forward, 128)
    assert rows[False] == (every if q is None else every | {"q": 160})
    assert rows[True] == (forward if q is None else forward | {"q": q})


def test_an_mlp_whose_scale_trains_is_read() -> None:
    model, ids = any_tiny("granite"), tokens(1, 64)
    for layer in model.model.layers:
        layer.residual_multiplier = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    truth = train_step(model, ids)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=32, checkpoints="attention"))
    assert_same_step(train_step(model, ids), truth)
    assert "model.layers.0.residual_multiplier" in truth.grads


def rows_of(model: Any, names: tuple[str, ...], step: Callable[[], object]) -> dict[str, int]:
    """How many tokens the frozen weights of the first layer's LoRA linears are multiplied with during a step."""
    layer = model.base_model.model.model.layers[0]
    return rows_through({name: layer.get_submodule(name).base_layer for name in names}, step)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_unread_products_are_really_left_out(rebuilt: bool) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    model, (ids, labels) = with_lora(tiny("llama", num_hidden_layers=4)), batch(64, 1)
    step = StepSizes(ModelSizes.of(model.config, layers=4, layer_parameters=1), ChunkPlan(64, 32), 1, 8, 8)
    room = {"device_budget_gib": 0, "host_budget_gib": least_host_bytes("attention", step) / 2**30}
    found = {}
    for fused in (False, True):
        handle = applied(model, fused=fused, checkpoints="attention", **room if rebuilt else {})
        found[fused] = rows_of(model, names, lambda: model(input_ids=ids, labels=labels).loss.backward())
        (plan,) = handle.store.plans.values()
        assert plan.kept.rebuilt == rebuilt
        handle.remove()
    # Forward 64 and replay 64; K, V of the first of two chunks again 32; the lowest layer once more 64.
    q, k, down = (160 + 64 * rebuilt, 160 + 64 * rebuilt, 128 + 64 * rebuilt)
    assert found[False] == dict(zip(names, (q, k, down), strict=True))
    assert found[True] == dict(zip(names, (128, 160, down - 64), strict=True))


@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp"])
def test_a_hook_on_the_last_product_or_its_mlp_gets_its_value(name: str, fused_calls: list[str]) -> None:
    model, (ids, labels) = tiny("llama"), batch(64, 1)
    handle = applied(model)
    model(input_ids=ids, labels=labels).loss.backward()
    fused_calls.clear()
    seen: list[bool] = []
    module = model.model.layers[0].get_submodule(name)
    module.register_forward_hook(lambda m, a, y: seen.append(bool(y.isfinite().all())))
    model(input_ids=ids, labels=labels).loss.backward()
    assert seen and all(seen)
    assert len(fused_calls) == 2  # the other layer's two chunks
    handle.remove()


def test_a_hook_on_every_module_gets_values(fused_calls: list[str]) -> None:
    model, (ids, labels) = tiny("llama"), batch(64, 1)
    seen: list[bool] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, a, y: seen.append(bool(y.isfinite().all())) if isinstance(y, Tensor) else None
    )
    with_fpdt(model, ids, labels, chunk_tokens=32)
    hook.remove()
    assert seen and all(seen) and not fused_calls


def test_adapters_put_in_after_apply_are_found(fused_calls: list[str]) -> None:
    model, (ids, labels) = tiny("llama"), batch(64, 1)
    handle = applied(model)
    model(input_ids=ids, labels=labels).loss.backward()
    with_adapters = get_peft_model(
        model, LoraConfig(r=RANK, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    fused_calls.clear()
    with_adapters(input_ids=ids, labels=labels).loss.backward()
    assert set(fused_calls) == {"_LoRALinear"}
    handle.remove()
    fused_calls.clear()
    with_adapters(input_ids=ids, labels=labels).loss.backward()
    assert not fused_calls


def test_a_linear_that_is_wrapped_later_gives_its_value(fused_calls: list[str]) -> None:
    """DoRA reads what its base computes, which nobody read before."""
    ids, labels = batch(64, 1)
    steps = []
    for evaluated in (False, True):
        model = tiny("llama")
        handle = applied(model)
        if evaluated:
            with torch.no_grad():
                model(input_ids=ids, labels=labels)
        torch.manual_seed(1)
        config = LoraConfig(r=RANK, target_modules="all-linear", use_dora=True, init_lora_weights=False)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).double()
        steps.append(loss_and_gradients(wrapped, ids, labels))
        handle.remove()
    assert_equal(steps[1], steps[0], 1e-12)


def test_fused_can_be_switched_off(fused_calls: list[str]) -> None:
    model, (ids, labels) = with_lora(tiny("llama")), batch(64, 1)
    handle = applied(model, fused=False)
    model(input_ids=ids, labels=labels).loss.backward()
    assert not fused_calls and "as the model has them" in str(handle)
