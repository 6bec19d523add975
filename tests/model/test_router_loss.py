"""The router's auxiliary loss in chunks, against transformers' own of whole logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fpdt import apply_fpdt, chunked_log_probs
from hf_fpdt.model.scoring.router import LayerSums, RouterSums
from tests.helpers.models import PLUGIN, TOLERANCE, assert_same_step, taken_step, tiny, tokens, train_step
from tests.helpers.recurrent import FAMILIES, recurrent
from tests.helpers.support import assert_rejects, relative_error

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "num_experts": 5, "mlp_only_layers": [1], "num_hidden_layers": 3},  # one layer without
    "mixtral": {**EXPERTS, "num_local_experts": 5},
    "olmoe": {**EXPERTS, "num_experts": 5},
    "gpt_oss": {"num_experts_per_tok": 2, "num_local_experts": 5, "attention": "eager"},
    "qwen3_next": {},
}
ON: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.7}  # as large as the other
IDS = tokens(2, 37)
MASK = torch.ones_like(IDS)
MASK[1, -9:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)


def made(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)  # biases and sinks
    model: Any = recurrent(name, **ON) if name in FAMILIES else tiny(name, **{**MODELS[name], **ON, **changes})
    model.set_experts_implementation("eager")  # other ways have no float64
    return model


@pytest.mark.parametrize("name", [name for name in MODELS if name in FAMILIES or name != "qwen3_next"])
def test_loss_and_gradients_are_those_of_whole_logits(name: str) -> None:
    given = {"labels": LABELS, "attention_mask": MASK}
    truth = train_step(made(name), IDS, **given)
    model = made(name)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS, **given), truth, 5 * TOLERANCE)
    with torch.no_grad():
        stock = made(name)
        found, expected = (each(input_ids=IDS, labels=IDS) for each in (model, stock))
    assert relative_error(found.aux_loss, expected.aux_loss) < TOLERANCE
    assert relative_error(found.loss, expected.loss) < TOLERANCE


@contextmanager
def last_chunk_alone() -> Iterator[None]:
    """Sums of the last chunk of each layer, and its gradient."""
    with changed(LayerSums, "of", lambda right, self, given, at: right(self, given, at) if at.stop >= 37 else None):
        yield


@contextmanager
def token_lost() -> Iterator[None]:
    """The first of every chunk."""

    def of(right: Any, self: RouterSums, logits: Any, at: slice) -> Tensor | None:
        found: Tensor | None = right(self, [each.flatten(0, -2)[1:] for each in logits], at)
        return found

    with changed(RouterSums, "of", of):
        yield


@contextmanager
def loss_twice() -> Iterator[None]:
    with changed(RouterSums, "loss", lambda right, self: 2 * right(self)):
        yield


@contextmanager
def no_gradient() -> Iterator[None]:
    with changed(RouterSums, "loss", lambda right, self: right(self).detach()):
        yield


@contextmanager
def changed(owner: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    right = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args: wrong(right, *args))
        yield


@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
def test_it_is_exact_whatever_is_kept_and_broken_variants_are_not(checkpoints: Any) -> None:
    given = {"labels": LABELS, "attention_mask": MASK}
    changes = {"num_hidden_layers": 4, "mlp_only_layers": []}
    truth = train_step(made("qwen3_moe", **changes), IDS, **given)
    model = made("qwen3_moe", **changes)
    apply_fpdt(model, replace(PLUGIN, checkpoints=checkpoints))

    def check(wrong: Any) -> None:
        with wrong():
            assert_same_step(train_step(model, IDS, **given), truth)

    @contextmanager
    def right() -> Iterator[None]:
        yield

    check(right)
    if checkpoints == "attention":
        broken = (last_chunk_alone, token_lost, loss_twice, no_gradient)
        assert_rejects(check, {each.__name__: each for each in broken})


def test_log_probs_have_it_beside_them() -> None:
    stock, model = made("qwen3_moe"), made("qwen3_moe")
    apply_fpdt(model, PLUGIN)
    steps = []
    for each in (stock, model):
        if each is stock:
            outputs = each(input_ids=IDS, labels=LABELS, attention_mask=MASK)
        else:
            outputs = chunked_log_probs(each, input_ids=IDS, labels=LABELS, attention_mask=MASK)
        loss = outputs.loss + 0.3 * outputs.aux_loss**2
        loss.backward()
        steps.append(taken_step(each, loss))
    assert_same_step(steps[1], steps[0])
    # A row that is padded on the left is moved, and its mask with it.
    ids, mask = (torch.stack([each[0], each[1].roll(9)]) for each in (IDS, MASK))
    with torch.no_grad():
        left = chunked_log_probs(model, input_ids=ids, labels=IDS * 0 - 100, attention_mask=mask).aux_loss
        assert (
            left is not None and relative_error(left, stock(input_ids=IDS, attention_mask=MASK).aux_loss) < TOLERANCE
        )


def test_without_labels_there_is_none_and_generation_goes_on() -> None:
    model = made("qwen3_moe")
    apply_fpdt(model, PLUGIN)
    with torch.no_grad():
        assert model(input_ids=IDS).aux_loss is None
        model.eval()
        stock = made("qwen3_moe").eval()
        stock.config.output_router_logits = False  # some releases fail in generate() with it
        found, truth = (each.generate(IDS, max_new_tokens=4, do_sample=False) for each in (model, stock))
    assert torch.equal(found, truth)
    with pytest.raises(NotImplementedError, match="with labels their auxiliary loss is returned"):
        model(input_ids=IDS, output_router_logits=True)


def test_another_loss_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("qwen3_moe")
    home = sys.modules[type(model).__module__]
    right = home.load_balancing_loss_func
    monkeypatch.setattr(home, "load_balancing_loss_func", lambda *args: 2 * right(*args))
    with pytest.raises(NotImplementedError, match="load_balancing_loss_func computes something else.*=False"):
        apply_fpdt(model, PLUGIN)
    model.config.output_router_logits = False
    apply_fpdt(model, PLUGIN)
    with pytest.raises(NotImplementedError, match="load_balancing_loss_func computes something else.*=False"):
        model(input_ids=IDS, labels=IDS, output_router_logits=True)
