"""`attn_implementation="fpdt"` in real models, without apply_fpdt: equal to "sdpa", or refused with a reason."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    DynamicCache,
    PreTrainedModel,
    masking_utils,
)

import hf_fpdt.model.attention_function
from hf_fpdt.layout.spans import Block
from hf_fpdt.model.attention_function import fpdt_attention, fpdt_mask, window_of_mask
from hf_fpdt.parallel.sharding import batch_shared_by
from tests.helpers.models import Step, assert_same_step, broken_steps, tiny, tokens, train_step
from tests.helpers.support import assert_rejects, max_error

WAY_OUT = 'choose "sdpa" or "eager"'


def test_importing_the_package_registers_the_name() -> None:
    assert AttentionInterface()["fpdt"] is hf_fpdt.model.attention_function.fpdt_attention
    assert AttentionMaskInterface()["fpdt"] is hf_fpdt.model.attention_function.fpdt_mask


def pair(**config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model over "fpdt" and over "sdpa"."""
    return tiny(attention="fpdt", **config), tiny(attention="sdpa", **config)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 63, 130])
def test_loss_and_gradients_equal_sdpa(batch: int, kv_heads: int, length: int) -> None:
    ours, theirs = pair(num_key_value_heads=kv_heads)
    ids = tokens(batch, length)
    if length == 1:  # nothing to predict, but a forward and a backward pass
        outputs = [model(input_ids=ids).logits for model in (ours, theirs)]
        for logits in outputs:
            logits.square().sum().backward()
        assert max_error(*outputs) < 1e-12
        assert max_error(*(m.get_input_embeddings().weight.grad for m in (ours, theirs))) < 1e-10
        return
    truth = train_step(theirs, ids)
    assert_same_step(train_step(ours, ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken_steps(theirs, ids))


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3", "gemma"])
def test_other_architectures_equal_sdpa(name: str) -> None:
    ids = tokens(2, 37)
    truth = train_step(tiny(name), ids)
    assert_same_step(train_step(tiny(name, attention="fpdt"), ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken_steps(tiny(name), ids))


# -- generation -------------------------------------------------------------------------------------------------------

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 5},
}


def generated(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    torch.manual_seed(0)
    return model.eval().generate(ids, max_new_tokens=9, **kwargs)


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and 2-D mask; row i has i tokens of padding on its left."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_generate_gives_the_tokens_of_sdpa(mode: str, padded: bool) -> None:
    ours, theirs = pair()
    ids, mask = left_padded(3, 13)
    mask = mask if padded else torch.ones_like(mask)
    result = [generated(model, ids, attention_mask=mask, **GENERATION[mode]) for model in (ours, theirs)]
    assert torch.equal(*result)


@pytest.mark.parametrize("pieces", [(7, 6), (1, 12), (5, 1, 7)])
def test_a_prompt_continued_on_a_cache_gives_the_logits_of_the_whole(pieces: tuple[int, ...]) -> None:
    ours, theirs = (model.eval() for model in pair())
    ids = tokens(2, sum(pieces))

    def logits(model: PreTrainedModel) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split(pieces, dim=1)]
        return torch.cat(parts, dim=1)

    def check(result: Tensor) -> None:
        assert max_error(result, truth) < 1e-5 * truth.abs().max()

    with torch.no_grad():
        truth = theirs(ids).logits
    check(logits(ours))
    with torch.no_grad():
        top_left = torch.cat([theirs(part).logits for part in ids.split(pieces, dim=1)], dim=1)
    assert_rejects(check, {"the cache not read": top_left})


# -- masks ------------------------------------------------------------------------------------------------------------


def test_right_padding_in_training_is_exact() -> None:
    ours, theirs = pair()
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, 29:] = mask[2, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    truth = train_step(theirs, ids, labels, attention_mask=mask)
    assert_same_step(train_step(ours, ids, labels, attention_mask=mask), truth)
    broken = broken_steps(theirs, ids, labels)
    broken["padding counted"] = train_step(theirs, ids, attention_mask=mask)
    assert_rejects(lambda step: assert_same_step(step, truth), broken)


def packed_positions() -> Tensor:
    return torch.cat([torch.arange(9), torch.arange(14)]).expand(1, -1)


def mask_4d() -> Tensor:
    """Causal, but the first four tokens are seen by nobody else."""
    mask = torch.ones(23, 23, dtype=torch.bool).tril()
    mask[4:, :4] = False
    return mask.expand(1, 1, -1, -1)


def left_mask() -> Tensor:
    mask = torch.ones(1, 23, dtype=torch.long)
    mask[:, :5] = 0
    return mask


MASKED: dict[str, Any] = {
    "left padding": lambda: {"attention_mask": left_mask()},
    "packed documents": lambda: {"position_ids": packed_positions(), "use_cache": False},
    "4-D mask": lambda: {"attention_mask": mask_4d()},
}


@pytest.mark.parametrize("case", MASKED)
def test_what_needs_a_mask_is_exact_without_gradients(case: str) -> None:
    ours, theirs = (model.eval() for model in pair())
    ids, kwargs = tokens(1, 23), MASKED[case]()
    real = left_mask()[0].bool() if case == "left padding" else slice(None)
    with torch.no_grad():
        truth = theirs(ids, **kwargs).logits[:, real]

        def check(logits: Tensor) -> None:
            assert max_error(logits[:, real], truth) < 1e-5 * truth.abs().max()

        check(ours(ids, **kwargs).logits)
        assert_rejects(check, {"mask dropped": theirs(ids).logits})


@pytest.mark.parametrize("case", MASKED)
def test_what_needs_a_mask_is_refused_in_training(case: str) -> None:
    with pytest.raises(NotImplementedError, match="(?i)pad on the right with label -100"):
        tiny(attention="fpdt")(tokens(1, 23), **MASKED[case]())


def test_positions_that_only_start_later_are_no_packed_documents() -> None:
    ours, theirs = pair()
    ids = tokens(2, 23)
    positions = (torch.arange(23) + 50).expand(2, -1)
    assert_same_step(train_step(ours, ids, position_ids=positions), train_step(theirs, ids, position_ids=positions))


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.0"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_is_not_causal_attention_is_refused_in_training(case: str) -> None:
    name, config, reason = REFUSED_MODELS[case]
    model = tiny(name, attention="fpdt", dtype=torch.float32, **config)
    with pytest.raises(NotImplementedError, match=reason):
        model(tokens(2, 23), use_cache=False)


def test_a_window_longer_than_the_sequence_is_no_window() -> None:
    ids = tokens(2, 23)
    ours, theirs = (train_step(tiny("mistral", attention=a, sliding_window=23), ids) for a in ("fpdt", "sdpa"))
    assert_same_step(ours, theirs)


def test_a_window_is_compared_with_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a chunk, or a rank, has a part."""
    assert fpdt_mask(1, 20, 20, local_size=24) is None
    with batch_shared_by(2):
        assert fpdt_mask(1, 20, 20, local_size=40) is None
        mask = fpdt_mask(1, 20, 20, local_size=24)
    assert mask is not None and mask.is_meta and window_of_mask(mask) == 24
    layer, q = tiny().model.layers[0].self_attn, torch.ones(1, 4, 8, 8)
    call = Mock(n_tokens=37, window=None)
    monkeypatch.setattr(hf_fpdt.model.attention_function, "current_call", lambda: call)
    with pytest.raises(NotImplementedError, match="asks for a window of 24 keys, and the mask made for it for none"):
        fpdt_attention(layer, q, q, q, None, sliding_window=24)
    call.window = 23
    with pytest.raises(NotImplementedError, match="asks for a window of 24 keys, and the mask made for it for 23"):
        fpdt_attention(layer, q, q, q, None, sliding_window=24)
    call.window = 24
    fpdt_attention(layer, q, q, q, None, sliding_window=24)
    assert call.attend.call_args.kwargs["spec"].window == 24


@pytest.mark.parametrize("window", [15, 24])
def test_a_window_is_known_where_a_rank_has_pieces_of_the_sequence(window: int) -> None:
    """transformers' mask function looks tokens up by their place on the rank, and sees documents in the pieces."""
    inputs, positions = torch.zeros(1, 20, 8), torch.cat([torch.arange(10), torch.arange(20, 30)])[None]
    config = tiny("mistral", attention="fpdt", sliding_window=window).config
    with batch_shared_by(2):
        mask = masking_utils.create_sliding_window_causal_mask(config, inputs, None, None, positions)
    assert window_of_mask(mask) == window


@pytest.mark.parametrize("gradients", [True, False])
def test_tokens_of_an_image_that_see_one_another_are_refused_on_ranks(gradients: bool) -> None:
    """The pieces of a rank are taken for documents, so nothing else says that the mask is not causal."""
    inputs, positions = torch.zeros(2, 20, 8), torch.cat([torch.arange(10), torch.arange(20, 30)]).expand(2, -1)
    config = tiny("mistral", attention="fpdt", sliding_window=5).config
    image = torch.full((2, 20), -1)
    for make in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        image[1] = -1
        with batch_shared_by(2):
            make(config, inputs, None, None, positions, block_sequence_ids=image)
            image[1, 4:7] = 0
            with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="other than causal"):
                make(config, inputs, None, None, positions, block_sequence_ids=image)


def test_a_local_mask_that_is_no_window_is_not_taken_for_one() -> None:
    size, no_padding = 8, torch.zeros(1, dtype=torch.long)
    causal: Any = masking_utils.causal_mask_function
    chunked = masking_utils.and_masks(masking_utils.chunked_overlay(size, no_padding), causal)
    windowed = masking_utils.and_masks(masking_utils.sliding_window_overlay(size), causal)
    longer = masking_utils.and_masks(masking_utils.sliding_window_overlay(size + 1), causal)
    shorter = masking_utils.and_masks(masking_utils.sliding_window_overlay(size - 1), causal)
    masks = {
        name: fpdt_mask(1, 20, 20, local_size=size, mask_function=function)
        for name, function in {"window": windowed, "chunks": chunked, "longer": longer, "shorter": shorter}.items()
    }
    assert {name: window_of_mask(mask) for name, mask in masks.items()} == {
        "window": size, "chunks": Block(size), "longer": None, "shorter": None,
    }  # fmt: skip
    layer, q = tiny().model.layers[0].self_attn, torch.ones(1, 4, 20, 8)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="an attention mask"):
        fpdt_attention(layer, q, q, q, masks["longer"])


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "attention bias"),
        ({"indices": torch.zeros(1, 23, 4, dtype=torch.long)}, "sparse attention"),
        ({"output_attentions": True}, "output_attentions off"),
        ({"is_causal": False}, "not causal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("gradients", [True, False])
def test_an_argument_that_changes_attention_is_refused(argument: dict[str, Any], reason: str, gradients: bool) -> None:
    model = tiny(attention="fpdt")
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError) as refused:
        model(tokens(1, 23), **argument)
    said = str(refused.value)
    assert (reason in said and WAY_OUT in said) or ("is_causal" in argument and "mask other than causal" in said)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_config_that_switches_causality_off_is_refused(gradients: bool) -> None:
    model = tiny(attention="fpdt")
    model.config.is_causal = False
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="causal"):
        model(tokens(1, 23))


def test_an_encoder_is_refused() -> None:
    model = tiny("bert", attention="fpdt", auto=AutoModel, attention_probs_dropout_prob=0.0)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="not causal"):
        model(tokens(1, 23))
    with pytest.raises(NotImplementedError, match="other than causal"):
        model(tokens(1, 23))


def test_a_mask_that_would_fill_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_fpdt.model.attention_function, "MASK_BYTES_LIMIT", 100)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="Pad on the right, or shorten the input"):
        tiny(attention="fpdt")(tokens(1, 23), attention_mask=left_mask())


def test_gradients_reach_everything_that_sdpa_trains() -> None:
    """Inputs that are embeddings, and a graph that goes on after the model."""
    ours, theirs = pair()
    ids = tokens(2, 23)

    def step(model: PreTrainedModel) -> Step:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embeddings, output_hidden_states=True)
        loss = out.logits.logsumexp(-1).mean() + out.hidden_states[1].square().mean()
        loss.backward()
        assert embeddings.grad is not None
        return Step(loss.detach(), {"embeddings": embeddings.grad})

    assert_same_step(step(ours), step(theirs))
