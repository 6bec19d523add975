"""Linears of bitsandbytes under FPDT: the numbers of the dequantised model, dequantised once a layer and pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import hf_fpdt.model.fused_linear
import hf_fpdt.model.layers
import hf_fpdt.model.weights.whole as whole
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import LOSS, worst_of_run
from hf_fpdt.commands.finetune.quantise import quantised_lines
from hf_fpdt.model.weights.packing import bitsandbytes_config, expert_weights, quantisable, quantise
from hf_fpdt.model.weights.quantised import dequantised, is_packed, is_whole
from tests.helpers.models import (
    CHUNK,
    PLUGIN,
    TOLERANCE,
    TOLERANCE_FP32,
    Step,
    assert_same_step,
    broken_steps,
    tokens,
    train_step,
)
from tests.helpers.quantised import counting, dequantised_twin, linears, tiny_plain, tiny_quantised
from tests.helpers.support import assert_rejects

bitsandbytes = pytest.importorskip("bitsandbytes")
IDS = tokens(1, 4 * CHUNK + 5)


def with_lora(model: Any, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """Adapters of random values, the same whatever the linears are."""
    config = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": False, **config}
    torch.manual_seed(0)  # DoRA takes norms of what adapters begin with
    made = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.empty(parameter.shape).normal_(std=0.2, generator=generator).to(dtype)
    return made.to(dtype).train()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The linears that were dequantised for a layer, in order."""
    found: list[Any] = []
    monkeypatch.setattr(whole, "dequantised", counting(whole.dequantised, found))
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "nf4"), ("llama", "int8"), ("gpt_neox", "int8"), ("qwen3_moe", "nf4"), ("qwen3_5_text", "nf4")],
)
def test_a_step_is_the_dequantised_models(family: str, kind: str, calls: list[Any]) -> None:
    """Whether or not LoRA is fused; each weight is dequantised once forward and once backward, whatever the chunks."""
    model = tiny_quantised(family, kind)
    truth = train_step(with_lora(dequantised_twin(model)), IDS)
    broken = broken_steps(with_lora(dequantised_twin(model)), IDS) if family == "llama" else {}
    broken["not quantised"] = train_step(with_lora(tiny_plain(family)), IDS)
    model, tolerance = with_lora(model), TOLERANCE_FP32 if family == "qwen3_5_text" else TOLERANCE  # an fp32 scan
    for fused in (True, False):
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, fused=fused))
        calls.clear()
        ours = train_step(model, IDS)
        assert len(linears(model)) >= 8 and calls == [*_in_order(model), *_backwards(model)]
        handle.remove()
        assert_same_step(ours, truth, tolerance)
    assert_rejects(lambda step: assert_same_step(step, truth, tolerance), broken)
    assert all(is_packed(m.weight) and "forward" not in vars(m) for m in linears(model).values())


def _in_order(model: Any) -> list[Any]:
    return [m for layer in _layers(model) for m in linears(layer).values()]


def _backwards(model: Any) -> list[Any]:
    return [m for layer in reversed(_layers(model)) for m in linears(layer).values()]


def _layers(model: Any) -> list[Any]:
    decoder: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(decoder.base_model.layers)


def test_fused_lora_and_unread_products_run_over_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 linears all: in forward, where the last product of a replay is not computed, and without LoRA too."""
    seen: list[Any] = []
    for name in ("_LoRALinear", "_UnreadLinear"):
        function = getattr(hf_fpdt.model.fused_linear, name)
        monkeypatch.setattr(function, "forward", staticmethod(counting(function.forward, seen)))
    model = with_lora(tiny_quantised("llama", "nf4"))
    apply_fpdt(model, replace(PLUGIN, checkpoints="attention"))
    train_step(model, IDS)
    captured = 2 * 2 * 4  # k and v of each layer and earlier chunk
    assert len(seen) == 14 * 5 * 2 + captured, "each linear in each chunk, forward and replayed"
    bare = tiny_quantised("llama", "nf4")
    truth = dequantised_twin(bare)
    for each in (bare, truth):
        each.model.norm.weight.requires_grad_(False)
        each.lm_head.requires_grad_(False)
    seen.clear()
    apply_fpdt(bare, replace(PLUGIN, checkpoints="attention"))
    assert_same_step(train_step(bare, IDS), train_step(truth, IDS))
    assert len(seen) == 2 * 5, "down_proj, of each layer and replayed chunk"


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_kinds_of_adapters(config: dict[str, Any]) -> None:
    """DoRA takes the norm of the dequantised weight, also in PEFT's own code."""
    model, twin = tiny_quantised("llama", "nf4"), None
    twin = with_lora(dequantised_twin(model), **config)
    model = with_lora(model, **config)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS), train_step(twin, IDS))


def test_dora_dequantises_no_more_often(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    everywhere: list[Any] = []
    model = with_lora(tiny_quantised("llama", "nf4"), use_dora=True)
    apply_fpdt(model, PLUGIN)
    counted = counting(bitsandbytes.functional.dequantize_4bit, everywhere)
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", counted)
    calls.clear()
    train_step(model, IDS)
    assert len(everywhere) == len(calls) == 2 * 14


def test_tied_embeddings_are_not_quantised() -> None:
    model = tiny_quantised("llama", "nf4", tie_word_embeddings=True)
    assert not any("lm_head" in name for name in linears(model))
    twin = with_lora(dequantised_twin(model))
    model = with_lora(model)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS), train_step(twin, IDS))


def test_a_rebuilt_layer_is_dequantised_once_more(calls: list[Any]) -> None:
    model = tiny_quantised("llama", "nf4", num_hidden_layers=4)
    truth = train_step(with_lora(dequantised_twin(model)), IDS)
    model = with_lora(model)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints="segment"))
    calls.clear()
    assert_same_step(train_step(model, IDS), truth)
    (plan,) = handle.store._tiers.plans.values()
    assert plan.kept.rebuilt > 0 and len(calls) == 7 * (2 * 4 + plan.kept.rebuilt)


def test_one_layer_is_whole_at_a_time_and_nothing_after(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[StorageWeakRef] = []
    original, most = whole.dequantised, [0]

    def watched(module: Any, dtype: torch.dtype) -> Tensor:
        made = original(module, dtype)
        made_of.append(StorageWeakRef(made.untyped_storage()))
        most[0] = max(most[0], sum(not storage.expired() for storage in made_of))
        return made

    model = with_lora(tiny_quantised("llama", "nf4", num_hidden_layers=3))
    handle = apply_fpdt(model, PLUGIN)
    monkeypatch.setattr(whole, "dequantised", watched)
    train_step(model, IDS)
    assert len(made_of) == 2 * 3 * 7 and most[0] == 7
    assert all(storage.expired() for storage in made_of) and not any(map(is_whole, linears(model).values()))
    sizes = handle._settings.sizes
    assert sizes.whole_weights == sum(m.in_features * m.out_features for m in linears(_layers(model)[0]).values())


def test_changed_weights_are_read_anew_and_broken_ways_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that outlives its step, and one that is let go of while chunks still read it."""
    model = tiny_quantised("llama", "nf4")
    other = tiny_quantised("llama", "nf4", compute=torch.float64)
    quantised_anew(other)
    truths = [train_step(with_lora(dequantised_twin(each)), IDS) for each in (model, other)]
    changed = linears(other)
    model = with_lora(model)
    apply_fpdt(model, PLUGIN)

    def steps() -> list[Step]:
        before = {name: m.weight for name, m in linears(model).items()}
        found = [train_step(model, IDS)]
        for (name, module), new in zip(linears(model).items(), changed.values(), strict=True):
            module.weight = new.weight
            assert name in before
        found.append(train_step(model, IDS))
        for name, module in linears(model).items():
            module.weight = before[name]
        return found

    def check(found: list[Step]) -> None:
        for ours, truth in zip(found, truths, strict=True):
            assert_same_step(ours, truth)

    check(steps())
    original, kept = whole.dequantised, dict[int, Tensor]()
    with monkeypatch.context() as patch:
        patch.setattr(whole, "dequantised", lambda m, dtype: kept.setdefault(id(m), original(m, dtype)))
        stale = steps()
    with monkeypatch.context() as patch, overwritten_after_a_chunk(patch):
        early = steps()
    assert_rejects(check, {"stale": stale, "let go of too early": early})


def quantised_anew(model: Any) -> None:
    """Other weights: half of what they were."""
    for module in linears(model).values():
        state = module.weight.quant_state
        module.weight = bitsandbytes.nn.Params4bit(
            0.5 * bitsandbytes.functional.dequantize_4bit(module.weight.data, state), quant_type="nf4", module=module
        ).to("cpu")


@contextmanager
def overwritten_after_a_chunk(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The memory of whole weights is given to others once a layer's first chunk is done."""
    made: list[Tensor] = []
    original, run = whole.dequantised, hf_fpdt.engine.layer_run.Layer.forward

    def kept(module: Any, dtype: torch.dtype) -> Tensor:
        made.append(original(module, dtype))
        return made[-1]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = run(self, *args, **kwargs)
        for each in made:
            each.data.mul_(0.9)
        made.clear()
        return y

    patch.setattr(whole, "dequantised", kept)
    patch.setattr(hf_fpdt.engine.layer_run.Layer, "forward", forward)
    yield


def test_weights_that_change_before_backward_are_refused() -> None:
    model = with_lora(tiny_quantised("llama", "nf4"))
    apply_fpdt(model, PLUGIN)
    loss = model(input_ids=IDS, labels=IDS).loss
    for module in linears(model).values():
        module.weight.data.view(torch.uint8)
    first = next(iter(linears(model).values()))
    first.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model(input_ids=IDS, labels=IDS).loss
    first.weight = bitsandbytes.nn.Params4bit(torch.zeros(32, 32), quant_type="nf4").to("cpu")
    with pytest.raises(RuntimeError, match="has other weights now"):
        loss.backward()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_as_accurate_as_plain_peft_in_bf16(autocast: bool, prepared: bool) -> None:
    """Also after `prepare_model_for_kbit_training`: fp32 norms and embeddings, checkpointing that is ours already."""
    model = tiny_quantised("llama", "nf4", torch.bfloat16)
    exact = train_step(with_lora(dequantised_twin(model).double()), IDS)
    if prepared:
        model = prepare_model_for_kbit_training(model)
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    # As PEFT makes adapters for each.
    model = with_lora(model, torch.float32 if prepared or autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive = train_step(model, IDS)
        apply_fpdt(model, PLUGIN)
        ours = train_step(model, IDS)

    def check(step: Step) -> None:
        found = worst_of_run(_tensors(step), _tensors(naive), _tensors(exact))
        assert found.passed, found

    check(ours)
    assert_rejects(check, {"scaled": Step(ours.loss, {name: 1.1 * grad for name, grad in ours.grads.items()})})


def test_other_dtypes_of_products_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """A `BitsAndBytesConfig` that says nothing of it computes in fp32."""
    hf_fpdt.model.fused_linear._say_not_fused.cache_clear()
    model = with_lora(tiny_quantised("llama", "nf4", torch.bfloat16, torch.float32), torch.bfloat16)
    apply_fpdt(model, PLUGIN)
    train_step(model, IDS)
    (said,) = (record.getMessage() for record in caplog.records if "slower code" in record.getMessage())
    assert "adapters are bfloat16, a layer's input is bfloat16, quantised weights compute in float32, so" in said
    assert "(autocast), or load them with bnb_4bit_compute_dtype=bfloat16." in said


def _tensors(step: Step) -> dict[str, Tensor]:
    return {LOSS: step.loss.double(), **{name: grad.double() for name, grad in step.grads.items()}}


def test_generation_and_evaluation_are_the_dequantised_models() -> None:
    """Also where bitsandbytes would repack a weight for the CPU and round its scales on the way."""
    model = tiny_quantised("llama", "nf4", torch.float32, vocab_size=64).eval()
    twin = dequantised_twin(model, torch.float32).eval()
    before = {name: dequantised(m, torch.float32) for name, m in linears(model).items()}
    apply_fpdt(model, PLUGIN)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    ids = IDS.clamp(max=63)
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)
    for name, module in linears(model).items():
        assert torch.equal(dequantised(module, torch.float32), before[name])


def test_saved_adapters_load_on_the_quantised_and_on_the_plain_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_plain("llama", torch.float32).save_pretrained(base)
    config = bitsandbytes_config("nf4", torch.float32)

    def load(**how: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how).train()

    model = with_lora(load(quantization_config=config), torch.float32)
    apply_fpdt(model, PLUGIN)
    ours = train_step(model, IDS)
    model.save_pretrained(adapter)
    twin = dequantised_twin(load(quantization_config=config), torch.float32)
    plain = PeftModel.from_pretrained(load(), adapter, is_trainable=True)
    again = PeftModel.from_pretrained(load(quantization_config=config), adapter, is_trainable=True)
    saved = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for other in (plain, again):
        assert all(torch.equal(p, saved[name]) for name, p in other.named_parameters() if "lora_" in name)
    truth = train_step(PeftModel.from_pretrained(twin, adapter, is_trainable=True), IDS)
    assert abs(ours.loss - truth.loss) < TOLERANCE_FP32 * truth.loss
    assert abs(ours.loss - train_step(plain, IDS).loss) > TOLERANCE_FP32 * truth.loss


def test_weights_that_fsdp_shards_are_refused() -> None:
    model = with_lora(tiny_quantised("llama", "nf4"))
    apply_fpdt(model, PLUGIN)
    layer: Any = _layers(model)[0]
    layer.unshard = layer.reshard = lambda: None
    with pytest.raises(NotImplementedError, match="under FSDP2"):
        train_step(model, IDS)


def test_a_linear_whose_forward_is_somebody_elses_is_left_alone() -> None:
    """accelerate's hooks replace it: it gets what it always got, in steps as in the trial, and is asked."""
    model, asked = tiny_quantised("llama", "nf4", torch.float32), list[bool]()
    twin = dequantised_twin(model, torch.float32)

    def twice(target: Any) -> None:
        original = target.forward

        def forward(x: Tensor) -> Tensor:
            asked.append(not hasattr(target, "quant_state") or is_packed(target.weight))
            y: Tensor = original(x)
            return 2 * y

        target.forward = forward

    for each in (model, twin):
        for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
            twice(_layers(each)[0].get_submodule(name))
    apply_fpdt(model, PLUGIN)
    asked.clear()
    assert_same_step(train_step(model, IDS), train_step(twin, IDS), 10 * TOLERANCE_FP32)
    assert len(asked) > 3 * 5 + 3 and all(asked)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_is_quantised_as_transformers_does_it(kind: str, tmp_path: Path) -> None:
    model = tiny_plain("qwen3_moe", torch.float32)
    model.save_pretrained(tmp_path)
    names = set(quantisable(model))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=bitsandbytes_config(kind, torch.float32), dtype=torch.float32
    )
    quantise(model, kind, torch.float32)
    theirs, ours = linears(loaded), linears(model)
    assert theirs.keys() == ours.keys() == names and not any("experts" in name for name in names)
    for name, module in theirs.items():
        assert torch.equal(module.weight, ours[name].weight)
        assert torch.equal(dequantised(module, torch.float32), dequantised(ours[name], torch.float32))


def test_without_the_package_it_says_which_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'which is not installed: pip install "hf_fpdt\[quantized\]"'):
        quantise(tiny_plain("llama", torch.float32), "nf4", torch.float32)


def test_experts_that_are_no_linears_stay_and_are_counted() -> None:
    model = tiny_plain("qwen3_moe", torch.float32)
    experts = {name: p for name, p in model.named_parameters() if "experts" in name}
    quantise(model, "nf4", torch.float32)
    assert all(p is experts[name] for name, p in model.named_parameters() if "experts" in name)
    assert expert_weights(model) == sum(p.numel() for p in experts.values()) > 0
    said = list(quantised_lines(model, torch.bfloat16))
    assert len(said) == 2 and f"{expert_weights(model):,} weights are experts" in said[1] and "bfloat16" in said[1]
    assert not list(quantised_lines(tiny_plain("llama", torch.float32), torch.float32))
