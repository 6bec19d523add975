"""Recurrent layers in real models, beside their own PyTorch path: loss and every gradient in float64 throughout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.plan import forward_bytes
from tests.helpers.kinds import TOLERANCE, in_double, with_adapters
from tests.helpers.models import CHUNK, PLUGIN, Step, assert_same_step, taken_step, tokens, train_step
from tests.helpers.recurrent import (
    FAMILIES,
    CutOff,
    Forgets,
    Rounded,
    Shifted,
    cache,
    recurrent,
    states_of_another_chunk,
)
from tests.helpers.support import assert_rejects, max_error

IDS = tokens(2, 37)


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def chunked(model: nn.Module, plugin: FPDTPlugin = PLUGIN) -> Any:
    model = copy.deepcopy(model)
    apply_fpdt(model, plugin)
    return model


def ours(model: nn.Module, ids: Tensor = IDS, plugin: FPDTPlugin = PLUGIN, **kwargs: Any) -> Step:
    """A step of a copy of the model in chunks."""
    return train_step(chunked(model, plugin), ids, **kwargs)


def assert_exact(step: Step, truth: Step) -> None:
    assert_same_step(step, truth, TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_fine_tuning_is_exact(name: str) -> None:
    model = recurrent(name)
    truth, applied = train_step(model, IDS), chunked(model)
    assert truth.loss.dtype == torch.float64
    assert_exact(train_step(applied, IDS), truth)
    broken = {}
    scans = name != "lfm2"
    for bug in (Forgets, CutOff, Shifted, *([Rounded] if scans else [])):
        with cache(bug):
            broken[bug.__name__] = train_step(applied, IDS)
    with states_of_another_chunk():
        broken["states of another chunk"] = train_step(applied, IDS)
    assert_rejects(lambda step: assert_exact(step, truth), broken)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [2, 5, 8, 9, 16, 17, 33])
def test_every_length_is_exact(length: int, batch: int) -> None:
    """Shorter than a chunk, of whole chunks, with one token left over, which no chunk is made of alone."""
    for name in ("qwen3_5_text", "bamba", "lfm2"):
        model, ids = recurrent(name), tokens(batch, length)
        applied = chunked(model)
        assert_exact(train_step(applied, ids), train_step(model, ids))
        sizes = [
            len(range(c.start, c.stop))
            for c in applied.model.layers[0]._fpdt_settings.plan_of(length, on_gpu=False).chunks
        ]
        assert sum(sizes) == length and (1 not in sizes or length == 1)


@pytest.mark.parametrize("chunk", [1, 2])
def test_odd_sequences_in_twos_have_no_chunk_of_one_token(chunk: int) -> None:
    model, ids = recurrent("mamba2"), tokens(1, 5)
    assert_exact(ours(model, ids, FPDTPlugin(chunk_tokens=chunk)), train_step(model, ids))


PLACES: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"device_budget_gib": 0, "host_budget_gib": 1},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "nemotron_h"])
def test_checkpoints_wherever_they_lie_are_exact(name: str, checkpoints: str, place: str) -> None:
    """And take what was predicted, to the byte: states at the borders of chunks among them."""
    changes: dict[str, Any] = {"num_hidden_layers": 4}
    if name == "qwen3_5_text":
        changes["layer_types"] = ["linear_attention", "full_attention"] * 2
    if name == "nemotron_h":
        changes |= {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"]}
    model = recurrent(name, **changes)
    applied = copy.deepcopy(model)
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints, **PLACES[place])
    handle = apply_fpdt(applied, plugin)
    loss = applied(input_ids=IDS, labels=IDS).loss
    held = handle.store.used_bytes()
    (plan,) = handle.store.plans.values()
    step = next(iter(handle.store.plans))[0]
    assert held["device"] + held["host"] == forward_bytes(plan.kept, step.layer_bytes())
    assert step.layer_bytes().all_states > 0
    loss.backward()
    assert_exact(taken_step(applied, loss), train_step(model, IDS))
    assert not handle.store.used_bytes()["device"] + handle.store.used_bytes()["host"]
    assert handle.store.used_bytes()["pinned"] == plan.forecast.host_bytes


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "granitemoehybrid"])
def test_accumulated_steps_are_exact(name: str) -> None:
    """Two forward passes before the first backward pass, of other lengths."""
    model, batches = recurrent(name), (IDS, tokens(2, 29, seed=3))

    def accumulated(model: Any) -> Step:
        losses = [model(input_ids=ids, labels=ids).loss / 2 for ids in batches]
        for loss in reversed(losses):
            loss.backward()
        return taken_step(model, torch.stack([loss.detach() for loss in losses]).sum())

    assert_exact(accumulated(chunked(model)), accumulated(model))


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "falcon_h1", "mamba2", "lfm2"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_rows_padded_on_the_right_are_exact(name: str, training: bool) -> None:
    model, mask = recurrent(name).train(training), torch.ones_like(IDS)
    mask[1, 23:] = 0
    batch = {"input_ids": IDS, "labels": IDS.masked_fill(mask == 0, -100), "attention_mask": mask}
    applied = chunked(model).train(training)
    if training:
        assert_exact(*(train_step(m, IDS, batch["labels"], attention_mask=mask) for m in (applied, model)))
        return
    with torch.no_grad():
        losses = [m(**batch).loss for m in (applied, model)]
    assert max_error(*losses) < TOLERANCE * float(losses[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_gives_the_tokens_of_the_plain_model(name: str) -> None:
    """After a step, whole prompts and padded ones, and the step after is what it was."""
    model = recurrent(name)
    applied, truth = chunked(model), train_step(model, IDS)
    for length in (5, 21):
        for mask in (
            torch.ones(2, length, dtype=torch.long),
            torch.arange(length).ge(torch.tensor([[0], [3]])).long(),
        ):
            drawn = [
                m.eval().generate(
                    IDS[:, :length] * mask, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
                )
                for m in (applied, model)
            ]
            assert torch.equal(*drawn)
        assert_exact(train_step(applied.train(), IDS), truth)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_is_exact(name: str) -> None:
    model = with_adapters(recurrent(name))
    assert_exact(ours(model), train_step(model, IDS))
