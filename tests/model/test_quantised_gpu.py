"""Weights of bitsandbytes on a GPU: an 8B model's layers in NF4, beside plain PEFT and float64 of the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import LOSS, Tensors, Worst, in_double, worst_of_run
from hf_fpdt.model.shapes import build_random, llama_8b, with_layers, with_lora
from hf_fpdt.model.weights.packing import dequantise, quantise
from hf_fpdt.plan.linears import under_way_bytes
from hf_fpdt.plan.placement import linear_share
from tests.helpers.quantised import linears

pytestmark = pytest.mark.gpu
pytest.importorskip("bitsandbytes")
TOKENS, CHUNK, VOCABULARY = 3000, 1024, 2048
ON_HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 8}
PLACES: dict[str, dict[str, Any]] = {
    "device": {},
    "host, in segments": {**ON_HOST, "checkpoints": "segment"},
}


def layers_8b(kind: str, *, dequantised: bool = False) -> Any:
    """Two layers of an 8B model, quantised on the GPU, with adapters that are not zero; equal calls, equal weights."""
    config = with_layers(llama_8b(), 2)
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = build_random(config, "cuda", torch.bfloat16, False)
    quantise(model, kind, torch.bfloat16)
    if dequantised:
        dequantise(model, torch.bfloat16, "cuda")
    model = with_lora(model)
    generator = torch.Generator("cuda").manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(2)).cuda()


def a_step(model: Any) -> Tensors:
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {LOSS: loss.detach(), **found}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_of_8b_are_as_accurate_as_plain_peft(kind: str) -> None:
    """At most twice plain PEFT's error against float64 of the dequantised weights."""
    truth = a_step(in_double(layers_8b(kind, dequantised=True)))
    plain = a_step(layers_8b(kind))

    def found(step: Tensors) -> Worst:
        return worst_of_run(step, plain, truth)

    for which, place in PLACES.items():
        model = layers_8b(kind)
        apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, **place))
        worst = found(a_step(model))
        print(f"{kind}, {which}: {worst.ratio:.2f} ({worst.name})")
        assert worst.passed, (which, worst)
    if kind == "nf4":
        other = layers_8b("int8")
        apply_fpdt(other, FPDTPlugin(chunk_tokens=CHUNK))
        assert not found(a_step(other)).passed


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_layer_is_dequantised_and_the_peak_is_planned(kind: str) -> None:
    """Beside the same step over weights that are packed until each product, the peak grows by a layer's weights."""
    model = layers_8b(kind)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    a_step(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    a_step(model)
    peak = torch.cuda.max_memory_allocated() - before
    (step, _), plan = next(iter(handle.store.plans.items()))
    whole = sum(m.in_features * m.out_features for m in linears(model.get_base_model().model.layers[0]).values())
    assert step.whole_bytes == 2 * whole
    assert whole * 2 < peak < 1.2 * step.working_bytes(plan.kv, resident=True) + plan.forecast.device_bytes


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_kept_outputs_of_linears_have_the_bits_and_the_peak_is_planned(kind: str) -> None:
    """On the device, and on the host, where copies run beside computation."""
    steps = []
    places: list[dict[str, Any]] = [
        {"checkpoints": "attention"},
        {"checkpoints": "linears"},
        {"checkpoints": "linears", **ON_HOST},
    ]
    for place in places:
        model = layers_8b(kind)
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, kernel="math", **place))
        a_step(model)  # kernels compile
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps.append(a_step(model))
        peak = torch.cuda.max_memory_allocated() - before
        (sizes, _), plan = next(iter(handle.store.plans.items()))
        assert linear_share(plan.kept, sizes, range(2)) == float(place["checkpoints"] == "linears")
        predicted = sizes.working_bytes(plan.kv, resident=True) + plan.forecast.device_bytes
        assert peak < 1.2 * (predicted + under_way_bytes(plan.kept, sizes.layer_bytes()))
    for kept in steps[1:]:
        assert kept.keys() == steps[0].keys() and all(torch.equal(kept[name], steps[0][name]) for name in kept)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("checkpoints", ["auto", "segment"])
def test_weights_on_the_host_have_the_bits_of_resident_ones(kind: str | None, checkpoints: str) -> None:
    """Six layers, so that copies run while others compute; the model is loaded and FPDT applied on the CPU."""
    config = with_layers(llama_8b(), 6)
    config.vocab_size = VOCABULARY

    def made(host_weights: bool) -> Any:
        torch.manual_seed(0)
        model = build_random(config, "cpu", torch.bfloat16, False, kind)
        how: dict[str, Any] = {"checkpoints": checkpoints, "device_budget_gib": 0, "host_budget_gib": 8}
        plugin = FPDTPlugin(chunk_tokens=CHUNK, host_weights=host_weights, **how)
        handle = apply_fpdt(model if host_weights else model.to("cuda"), plugin)
        torch.manual_seed(1)
        model = with_lora(model).to("cuda")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.01, generator=torch.Generator("cuda").manual_seed(2))
        return model, handle

    torch.cuda.reset_peak_memory_stats()
    model, handle = made(True)
    weights = handle._settings.host_weights
    waiting = [p for name, p in model.named_parameters() if ".layers." in name and not p.requires_grad]
    assert waiting and all(p.device.type == "cpu" and p.is_pinned() for p in waiting)
    stays = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_cuda)
    assert torch.cuda.max_memory_allocated() < stays + weights.largest, "never a copy of the model on the GPU"
    ours = [a_step(model) for _ in range(3)]
    assert weights.on_device == 0
    del model, handle
    resident, _ = made(False)
    theirs = a_step(resident)
    for step in ours:
        assert step.keys() == theirs.keys() and all(torch.equal(step[name], theirs[name]) for name in theirs)
