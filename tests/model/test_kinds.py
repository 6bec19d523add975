"""Windows, sinks, softcap and latent attention in real models: loss and every gradient in float64 throughout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.calls import TrialCall, calling
from hf_fpdt.model.attention_function import fpdt_attention, fpdt_mask
from tests.helpers.kinds import (
    FAMILIES,
    TOLERANCE,
    WINDOW,
    Forgets,
    Overwrites,
    broken_kinds,
    in_double,
    kind,
    ring,
    windows_of,
    with_adapters,
)
from tests.helpers.models import CHUNK, PLUGIN, Step, assert_same_step, taken_step, tiny, tokens, train_step
from tests.helpers.support import assert_rejects, max_error

IDS = tokens(2, 37)


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def ours(model: nn.Module, ids: Tensor, plugin: FPDTPlugin = PLUGIN, **kwargs: Any) -> Step:
    """A step of a copy of the model in chunks."""
    model = copy.deepcopy(model)
    apply_fpdt(model, plugin)
    return train_step(model, ids, **kwargs)


def assert_exact(step: Step, truth: Step) -> None:
    assert_same_step(step, truth, TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_fine_tuning_is_exact(name: str) -> None:
    model = kind(name)
    truth = train_step(model, IDS)
    assert truth.loss.dtype == torch.float64
    assert_exact(ours(model, IDS), truth)
    if broken := broken_kinds(name, IDS):
        assert_rejects(lambda step: assert_exact(step, truth), broken)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_is_exact(name: str) -> None:
    model = with_adapters(kind(name))
    truth = train_step(model, IDS)
    assert_exact(ours(model, IDS), truth)
    if name == "gpt_oss":
        assert any("sinks" in grad for grad in truth.grads) and any("experts" in grad for grad in truth.grads)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_ring_that_forgets_is_seen(name: str) -> None:
    model = kind(name)
    truth = train_step(model, IDS)
    broken = {}
    for bug in (Forgets, Overwrites):
        with ring(bug):
            broken[bug.__name__] = ours(model, IDS)
    assert_rejects(lambda step: assert_exact(step, truth), broken)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("window", [1, 7, 8, 17, 36, 37, 64])
def test_every_window_is_exact(name: str, window: int) -> None:
    """Of one key, smaller and larger than a chunk of 8, as long as the sequence, and longer."""
    model = kind(name, sliding_window=window)
    for length in (37, 40):
        ids = tokens(2, length)
        assert_exact(ours(model, ids), train_step(model, ids))


@pytest.mark.parametrize("block", [1, 3, 8, 10, 16, 17, 36, 37])
def test_every_block_is_exact(block: int) -> None:
    """Of one key, smaller than a chunk of 8, as long, of several chunks and parts of them, as long as the sequence."""
    model = kind("llama4_text", attention_chunk_size=block)
    for length in (37, 40):
        ids = tokens(2, length)
        assert_exact(ours(model, ids), train_step(model, ids))


@pytest.mark.parametrize("length", [2, 5, 8, 9, 16, 33])
def test_every_length_is_exact(length: int) -> None:
    ids = tokens(3, length)
    for name in ("mistral", "gpt_oss"):
        model = kind(name)
        assert_exact(ours(model, ids), train_step(model, ids))


PLACES: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"device_budget_gib": 0, "host_budget_gib": 1},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "deepseek_v3", "llama4_text"])
def test_checkpoints_wherever_they_lie_are_exact(name: str, checkpoints: str, place: str) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 4}
    if windows_of(kind(name)):
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if name == "llama4_text":
        changes |= {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0] * 2}
    model = kind(name, **changes)
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints, **PLACES[place])
    assert_exact(ours(model, IDS, plugin), train_step(model, IDS))


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "deepseek_v3"])
def test_accumulated_steps_are_exact(name: str) -> None:
    model, other = kind(name), tokens(2, 29, seed=3)
    truth, step = (accumulated(m, IDS, other) for m in (model, chunked(model)))
    assert_exact(step, truth)


@pytest.mark.parametrize("checkpoints", ["input", "segment"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "gate_proj", "up_proj"]], ids=["all", "some"])
def test_adapters_of_experts_are_exact_however_often_layers_run(targets: Any, checkpoints: str) -> None:
    """PEFT takes weights of experts out of their module and puts them back, last, whenever they run."""
    model = with_adapters(kind("deepseek_v3", num_hidden_layers=3), targets=targets)
    other = tokens(2, 29, seed=3)
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints)
    truth, step = (accumulated(m, IDS, other) for m in (model, chunked(model, plugin)))
    assert any("experts" in grad for grad in truth.grads)
    assert_exact(step, truth)


def chunked(model: nn.Module, plugin: FPDTPlugin = PLUGIN) -> Any:
    model = copy.deepcopy(model)
    apply_fpdt(model, plugin)
    return model


def accumulated(model: Any, *batches: Tensor) -> Step:
    losses = [model(input_ids=ids, labels=ids).loss / len(batches) for ids in batches]
    for loss in losses:
        loss.backward()
    return taken_step(model, torch.stack([loss.detach() for loss in losses]).sum())


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_dropout_of_adapters_is_drawn_again_in_windowed_layers(name: str) -> None:
    """By place, other numbers than the whole draws: the same step twice, with and without checkpoints, is compared."""
    model = with_adapters(kind(name), dropout=0.3)
    steps = []
    for checkpoints in ("attention", "input"):
        torch.manual_seed(5)
        steps.append(ours(model, IDS, FPDTPlugin(chunk_tokens=CHUNK, checkpoints=checkpoints, loss_chunk_tokens=6)))
    assert_exact(*steps)
    # With all numbers of a chunk that spans the sequence drawn at once, the plain model draws the same.
    torch.manual_seed(5)
    whole = ours(model, IDS, FPDTPlugin(chunk_tokens=64, loss_chunk_tokens=64))
    torch.manual_seed(5)
    assert_exact(whole, train_step(model, IDS))
    assert_rejects(lambda step: assert_exact(step, whole), {"others drawn": train_step(model, IDS)})


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2"])
def test_autocast_is_as_accurate_as_the_plain_model(name: str) -> None:
    model = kind(name).float()
    truth = train_step(copy.deepcopy(model).double(), IDS)

    def step(model: PreTrainedModel) -> Step:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return taken_step(model, loss)

    naive, results = step(copy.deepcopy(model)), step(chunked(model))
    assert results.grads.keys() == truth.grads.keys()
    errors = {
        key: [float((s.grads[key].double() - truth.grads[key]).norm()) for s in (results, naive)]
        for key in truth.grads
    }
    for key, (our, their) in errors.items():
        assert our <= 2 * their + 1e-3 * float(truth.grads[key].norm()), f"{key}: {our:.2e}, not {their:.2e}"


# -- without gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2", "deepseek_v3", "qwen2_moe", "llama4_text"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "right-padded"])
@pytest.mark.parametrize("applied", [True, False], ids=["applied", "name alone"])
def test_evaluation_past_the_window_is_exact(name: str, padded: bool, applied: bool) -> None:
    model, mask = kind(name).eval(), torch.ones_like(IDS)
    if padded:
        mask[1, 23:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    results = []
    for each in (model, chunked(model) if applied else kind(name, attention="fpdt").eval()):
        with torch.no_grad():
            out = each(input_ids=IDS, labels=labels, attention_mask=mask if padded else None)
        results.append(out.loss)
    assert max_error(*results) < TOLERANCE * float(results[0])


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, : 3 * row], mask[row, : 3 * row] = 0, 0
    return ids, mask


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2", "gemma3_text", "llama4_text"])
def test_generate_gives_the_tokens_of_the_plain_model(name: str, cache: str) -> None:
    """Prompts shorter and longer than the window, whole and padded on the left, with and without apply_fpdt."""
    reference = kind(name).eval()
    models = {"name alone": kind(name, attention="fpdt").eval(), "applied": chunked(reference)}
    for length in (5, 8, 21):
        for padded in (False, True):
            ids, mask = left_padded(3 if length > 8 else 2, length)
            mask = mask if padded else torch.ones_like(mask)

            def tokens_of(model: Any, ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
                drawn: Tensor = model.generate(
                    ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, **CACHES[cache]
                )
                return drawn

            try:
                expected = tokens_of(reference)
            except TypeError:  # transformers 5.17 has no static cache for Llama 4
                pytest.skip("the plain model of this transformers fails")
            for which, model in models.items():
                assert torch.equal(tokens_of(model), expected), f"{which}, {length} tokens, padded: {padded}"


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("pieces", [(20, 1, 1, 5), (4, 12, 6), (1, 1, 1)])
def test_a_prompt_continued_on_a_cache_gives_the_logits_of_the_whole(name: str, pieces: tuple[int, ...]) -> None:
    ids = tokens(2, sum(pieces))
    with torch.no_grad():
        truth = kind(name).eval()(ids).logits
        for model in (kind(name, attention="fpdt").eval(), chunked(kind(name)).eval()):
            cache, parts = None, []
            for part in ids.split(pieces, dim=1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert max_error(torch.cat(parts, dim=1), truth) < TOLERANCE * float(truth.abs().max())


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_a_mask_of_ones_own_is_exact_without_gradients(name: str, additive: bool) -> None:
    keep = torch.ones(37, 37, dtype=torch.bool).tril()
    keep[4:, :4] = False
    mask: Any = keep.expand(2, 1, -1, -1)
    eager = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad():
        truth = kind(name).eval()(IDS, attention_mask=eager).logits
        for model in (kind(name, attention="fpdt").eval(), chunked(kind(name)).eval()):
            logits = model(IDS, attention_mask=eager if additive else mask).logits
            assert max_error(logits, truth) < TOLERANCE * float(truth.abs().max())


def test_a_mask_of_ones_own_and_left_padding_are_refused_in_training() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for name in ("mistral", "gpt_oss"):
        for model in (kind(name, attention="fpdt"), chunked(kind(name))):
            with pytest.raises(NotImplementedError, match="(?i)pad on the right with label -100"):
                model(input_ids=IDS, labels=IDS, attention_mask=mask)


def test_right_padding_in_training_is_exact() -> None:
    mask = torch.ones_like(IDS)
    mask[1, 23:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    for name in ("mistral", "gpt_oss", "gemma2"):
        model = kind(name)
        truth = train_step(model, IDS, labels, attention_mask=mask)
        assert_exact(ours(model, IDS, labels=labels, attention_mask=mask), truth)


def test_the_name_alone_trains_exactly() -> None:
    for name in FAMILIES:
        assert_exact(train_step(kind(name, attention="fpdt"), IDS), train_step(kind(name), IDS))


def test_a_first_sequence_within_the_window_is_no_reason_to_refuse_a_layer() -> None:
    """No mask is made for it; layers that look another way than when FPDT was applied are tried on it."""
    for name in ("mistral", "gpt_oss"):
        model = chunked(kind(name))
        model.eval()
        with torch.no_grad():
            for length in (WINDOW, 37):
                loss = model(input_ids=IDS[:, :length], labels=IDS[:, :length]).loss
                assert max_error(loss, kind(name)(input_ids=IDS[:, :length], labels=IDS[:, :length]).loss) < 1e-9
        adapted = with_adapters(chunked(kind(name)))
        for length in (WINDOW, 37):
            assert_exact(train_step(adapted, IDS[:, :length]), train_step(with_adapters(kind(name)), IDS[:, :length]))


# -- what is refused --------------------------------------------------------------------------------------------------


def disagreeing(name: str, set_window: Callable[[Any], None]) -> PreTrainedModel:
    model = kind(name)
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            set_window(module)
    return model


@pytest.mark.parametrize("window", [WINDOW + 1, 4096])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss"])
def test_a_window_that_is_another_in_the_mask_is_refused_before_any_step(name: str, window: int) -> None:
    """One function goes by the mask, another by the argument."""
    model = disagreeing(name, lambda module: setattr(module, "sliding_window", window))
    with pytest.raises(NotImplementedError, match=f"a window of {window} keys, and the mask made for it for (9|none)"):
        apply_fpdt(model, PLUGIN)


def test_a_windows_mask_by_another_way_is_refused() -> None:
    """Inside a layer's chunk it would be no window of the sequence."""
    q = torch.ones(1, 4, 8, 8)
    mask = fpdt_mask(1, 37, 37, local_size=WINDOW)
    with calling(TrialCall()), pytest.raises(NotImplementedError, match="an attention mask"):
        fpdt_attention(nn.Module(), q, q, q, mask)


GEMMA3N: dict[str, Any] = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 80, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9,
    "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


def test_hidden_states_of_four_dimensions_are_refused_before_any_step() -> None:
    """Gemma 3n has several of each token: the second axis is the batch."""
    model = tiny("gemma3n_text", attention="eager", **GEMMA3N)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn.q_proj" in name)
    with pytest.raises(NotImplementedError, match=r"hidden states of shape \(4, 1, 48, 32\)"):
        apply_fpdt(model, PLUGIN)


def test_a_single_token_tries_no_layer_and_forgets_no_place() -> None:
    """Nothing can be cut of one token: what was found of the layers before stays."""
    model = kind("llama4_text")
    truth = train_step(model, IDS)
    apply_fpdt(model, PLUGIN)
    with torch.no_grad():
        model.eval()(input_ids=IDS[:, :1], use_cache=False)
    model.zero_grad()
    assert_exact(train_step(model.train(), IDS), truth)
