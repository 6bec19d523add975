"""Rows padded on the left: scored as by a masked model where positions are relative, refused elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fpdt import FPDTPlugin, apply_fpdt, chunked_log_probs
from hf_fpdt.model.scoring import left_padding
from hf_fpdt.model.scoring.left_padding import Moved, why_not_moved
from tests.helpers.models import PLUGIN, TOLERANCE, Step, assert_same_step, taken_step, tiny, tokens
from tests.helpers.support import assert_rejects, relative_error
from tests.model.test_log_probs import factors, made

# As in GRPO: prompts of 6 and 19 tokens end at place 21, completions are filled up on the right.
PROMPTS, LENGTH = 21, 37
IDS = tokens(2, LENGTH)
MASK = torch.ones_like(IDS)
MASK[0, : PROMPTS - 6], MASK[1, : PROMPTS - 19], MASK[1, -4:] = 0, 0, 0
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(LENGTH) < PROMPTS), -100)
LLAMA4 = {"num_local_experts": 2, "interleave_moe_layer_step": 1, "max_position_embeddings": 20_000}
NOT_RELATIVE: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "embeddings know the place"),
    "ministral3": ({"max_position_embeddings": 20_000}, "layer 0.*by more than a rotation"),
    "llama4_text": ({**LLAMA4, "num_hidden_layers": 4}, "layer 3.*by more than a rotation"),
}


def scored(log_probs: Tensor, model: Any) -> tuple[Step, Tensor]:
    loss = (log_probs * factors(log_probs)).sum()
    loss.backward()
    return taken_step(model, loss), log_probs.detach()


def whole(model: Any) -> tuple[Step, Tensor]:
    """Each row by itself, without its padding, of whole logits."""
    log_probs = torch.zeros(len(IDS), LENGTH - 1, dtype=torch.float64)
    for row, real in enumerate(MASK.bool()):
        at = LABELS[row, real][1:]
        log_p = model(input_ids=IDS[None, row, real]).logits[0, :-1].double().log_softmax(-1)
        found = log_p.gather(-1, at.clamp(min=0)[:, None])[:, 0].masked_fill(at == -100, 0)
        start = int(real.int().argmax())
        log_probs = log_probs.index_put((torch.tensor(row), torch.arange(start, start + len(at))), found)
    return scored(log_probs, model)


def under_a_mask(model: Any) -> Tensor:
    targets = LABELS[:, 1:]
    log_p = model(input_ids=IDS, attention_mask=MASK).logits[:, :-1].log_softmax(-1)
    found: Tensor = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    return found


def ours(model: Any, **changes: Any) -> tuple[Step, Tensor]:
    found = chunked_log_probs(model, **{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, **changes})
    assert found.log_probs is not None
    return scored(found.log_probs, model)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "qwen3_moe", "qwen3_5_text"])
def test_they_train_as_without_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, model = whole(made(name)), made(name)
    apply_fpdt(model, PLUGIN)

    def check(found: tuple[Step, Tensor]) -> None:
        assert_same_step(found[0], truth[0], 5 * TOLERANCE)
        assert relative_error(found[1], truth[1]) < TOLERANCE

    check(ours(model))
    check(ours(model, position_ids=torch.arange(LENGTH).expand(2, -1)))
    embedded = model.get_input_embeddings()(IDS).detach()
    assert torch.equal(ours(model, input_ids=None, inputs_embeds=embedded)[1], ours(model)[1])
    if name == "llama":
        mask = MASK.clone()
        mask[0, : PROMPTS - 7] = 0
        mask[0, PROMPTS - 7] = 1
        broken = {"another token is seen": ours(model, attention_mask=mask)}
        monkeypatch.setattr(Moved, "back", lambda self, values: values)
        assert_rejects(check, {**broken, "not moved back": ours(model)})


@pytest.mark.parametrize("name", NOT_RELATIVE)
def test_where_positions_are_not_relative_they_are_refused_in_training(name: str) -> None:
    settings, why = NOT_RELATIVE[name]
    model: Any = tiny(name, dtype=torch.float32, **settings)
    apply_fpdt(model, PLUGIN)
    assert re.search(why, why_not_moved(model) or "")
    with pytest.raises(NotImplementedError, match="padding on the left"):
        ours(model)


def test_where_nothing_is_trained_a_mask_serves_positions_that_are_not_relative() -> None:
    stock, model = (tiny("gpt2", **NOT_RELATIVE["gpt2"][0]) for _ in range(2))
    apply_fpdt(model, PLUGIN)
    with torch.no_grad():
        truth = under_a_mask(stock)
        found = chunked_log_probs(model, input_ids=IDS, attention_mask=MASK, labels=LABELS).log_probs
    assert found is not None and relative_error(found, truth) < TOLERANCE


def test_the_model_is_asked_once_and_before_the_first_padded_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny(dtype=torch.bfloat16)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=8))
    asked = []
    right = left_padding._why_not_relative

    def counted(model: Any) -> str | None:
        asked.append(1)
        return right(model)

    monkeypatch.setattr(left_padding, "_why_not_relative", counted)
    state = torch.get_rng_state()
    for _ in range(2):
        assert why_not_moved(model) is None
    assert asked == [1] and torch.equal(torch.get_rng_state(), state)


def test_what_padding_would_predict_and_what_has_other_axes_is_refused() -> None:
    model = tiny()
    apply_fpdt(model, PLUGIN)
    with pytest.raises(ValueError, match=r"first token has a label, which padding would predict: set .* to -100"):
        ours(model, labels=IDS.masked_fill(MASK == 0, -100))
    with pytest.raises(NotImplementedError, match=r"bias of shape \(1, 37\) has its tokens along another axis"):
        ours(model, bias=torch.zeros(1, LENGTH))
