"""`chunked_log_probs` and TRL's call of the model, against whole logits of the model without FPDT."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_fpdt import FPDTPlugin, apply_fpdt, chunked_log_probs
from hf_fpdt.parallel.group import SequenceParallelGroup
from tests.helpers.models import PLUGIN, TOLERANCE, Step, assert_same_step, taken_step, tiny, tokens
from tests.helpers.recurrent import recurrent
from tests.helpers.support import assert_rejects, relative_error

ASKED = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
# Heads with a softcap, a factor, a bias; recurrent layers.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "qwen3_moe": MOE,
    "gemma2": {
        "attention": "eager",
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
}
IDS = tokens(2, 37)
LABELS = IDS.masked_fill(torch.arange(37) < 11, -100)
LABELS[1, -5:] = -100


def made(name: str) -> Any:
    """A float64 model."""
    model = tiny(name, **MODELS[name]) if name in MODELS else recurrent(name)
    if name == "qwen3_moe":  # other ways to run experts have no float64
        model.set_experts_implementation("eager")
    return model


def factors(like: Tensor) -> Tensor:
    """Each token's own, as preferences have them."""
    return torch.linspace(-1, 2, like.numel(), dtype=torch.float64).view_as(like)


def loss_of(log_probs: Tensor, entropy: Tensor) -> Tensor:
    return (log_probs * factors(log_probs)).sum() + 0.1 * entropy.sum()


def whole(model: nn.Module, labels: Tensor = LABELS, temperature: float = 0.7) -> tuple[Step, dict[str, Tensor]]:
    """By PyTorch, of whole logits; `labels` of the tokens themselves."""
    z = model(input_ids=IDS).logits[:, :-1].double() / temperature
    targets, log_p = labels[:, 1:], z.log_softmax(-1)
    mask, at = targets != -100, targets.clamp(min=0)[..., None]
    values = {
        "log_probs": log_p.gather(-1, at)[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == at[..., 0],
    }
    values = {name: value.masked_fill(~mask, 0) for name, value in values.items()}
    loss = loss_of(values["log_probs"], values["entropy"])
    loss.backward()
    return taken_step(model, loss), {name: value.detach() for name, value in values.items()}


def ours(model: nn.Module, **call: Any) -> tuple[Step, dict[str, Tensor]]:
    """By one call of a model with FPDT: ours, or TRL's."""
    given = {"input_ids": IDS, "labels": LABELS, **call}
    if "fused_lm_head" not in call:
        given |= {"temperature": 0.7, "outputs": ASKED, **call}
    found: Any = model(**given) if "fused_lm_head" in call else chunked_log_probs(model, **given)
    loss = loss_of(found.log_probs, found.entropy)
    loss.backward()
    return taken_step(model, loss), {name: found[name].detach() for name in ("log_probs", *ASKED)}


def check(found: tuple[Step, dict[str, Tensor]], truth: tuple[Step, dict[str, Tensor]]) -> None:
    assert_same_step(found[0], truth[0], 5 * TOLERANCE)  # losses of many terms that cancel
    for name, value in truth[1].items():
        assert relative_error(found[1][name].double(), value.double()) < TOLERANCE, name


@pytest.mark.parametrize("name", [*MODELS, "qwen3_5_text"])
def test_values_and_gradients_are_those_of_whole_logits(name: str) -> None:
    truth, model = whole(made(name)), made(name)
    apply_fpdt(model, PLUGIN)
    same = functools.partial(check, truth=truth)
    same(ours(model))
    shifted = torch.cat([LABELS[:, 1:], LABELS.new_full((2, 1), -100)], 1)
    own = chunked_log_probs(model, input_ids=IDS, shift_labels=shifted, temperature=0.7)
    assert own.log_probs is not None and torch.equal(own.log_probs[:, -1], torch.zeros(2, dtype=own.log_probs.dtype))
    assert relative_error(own.log_probs[:, :-1], truth[1]["log_probs"]) < TOLERANCE
    if name == "llama":
        twice = Step(truth[0].loss, {key: 2 * grad for key, grad in truth[0].grads.items()})
        broken = {
            "temperature lost": ours(model, temperature=1.0),
            "labels off by one": ours(model, labels=LABELS.roll(1, 1)),
            "gradient counted twice": (twice, truth[1]),
        }
        assert_rejects(same, broken)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_trls_call_is_answered_as_trl_does_without_its_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    truth, model = whole(made(name)), made(name)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *ASKED))
    apply_fpdt(model, PLUGIN)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    check(ours(model, fused_lm_head=True), truth)
    with torch.no_grad():
        found = model(input_ids=IDS, labels=LABELS, fused_lm_head=True, num_items_in_batch=torch.tensor(9))
    assert type(found) is utils.FusedCausalLMOutput and torch.equal(found.label_mask, LABELS[:, 1:] != -100)
    assert float(found.loss) == pytest.approx(-float(truth[1]["log_probs"].sum()) / 9, rel=1e-6)
    # Other calls are the model's.
    assert model(input_ids=IDS).logits.shape[1] == 37 and model(input_ids=IDS, labels=IDS).loss > 0


def test_adapters_train_through_the_wrapper() -> None:
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    models = []
    for attention in ("sdpa", "fpdt"):
        model = tiny(attention=attention)
        torch.manual_seed(0)
        models.append(get_peft_model(model, config).double())
    apply_fpdt(models[1], PLUGIN)
    check(ours(models[1]), whole(models[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_computes_in_fp32_where_asked(dtype: torch.dtype) -> None:
    """Under autocast, in which a head in fp32 would be cast down."""
    model: Any = tiny(dtype=dtype)
    apply_fpdt(model, PLUGIN)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        hidden = model.model(input_ids=IDS, use_cache=False).last_hidden_state
        found = [
            chunked_log_probs(model, input_ids=IDS, labels=LABELS, head_in_fp32=wide).log_probs
            for wide in (True, False)
        ]
    logits = hidden.float() @ model.lm_head.weight.float().T
    targets = LABELS[:, 1:]
    truth = logits.detach()[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    truth = truth.masked_fill(targets == -100, 0)

    def same(value: Tensor | None) -> None:
        assert value is not None and value.dtype == torch.float32 and relative_error(value, truth) < TOLERANCE

    same(found[0])
    assert_rejects(same, {"not in fp32": found[1]})
    assert "forward" not in vars(model.lm_head)


def test_trls_call_is_answered_under_accelerates_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a reference model, which accelerate has wrapped before FPDT is applied."""
    utils = pytest.importorskip("trl.trainer.utils")
    model: Any = tiny(dtype=torch.float32)
    utils.add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    with torch.no_grad():
        truth = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
        apply_fpdt(model, PLUGIN)
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
        found = model(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs
    assert found.dtype == torch.float32 and relative_error(found, truth) < 0.02  # layers under autocast


def test_logits_are_never_whole() -> None:
    model: Any = tiny()
    apply_fpdt(model, PLUGIN)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.numel() // out.shape[-1]))
    ours(model)
    counted = int((LABELS[:, 1:] != -100).sum())
    # Of a token of each row the model makes its output object; then forward, and again in backward.
    assert max(seen) <= PLUGIN.loss_chunk_tokens and sum(seen) == 2 + 2 * counted  # type: ignore[operator]


def test_what_cannot_be_answered_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="this model has no FPDT; call apply_fpdt"):
        chunked_log_probs(model, input_ids=IDS, labels=LABELS)
    handle = apply_fpdt(model, PLUGIN)
    with pytest.raises(ValueError, match=r"temperature=0.*above 0"):
        chunked_log_probs(model, input_ids=IDS, labels=LABELS, temperature=0)
    with pytest.raises(ValueError, match=r"outputs=\['perplexity'\].*there are entropy"):
        chunked_log_probs(model, input_ids=IDS, labels=LABELS, outputs=["perplexity"])
    with pytest.raises(ValueError, match="pass labels, or shift_labels"):
        chunked_log_probs(model, input_ids=IDS)
    with pytest.raises(NotImplementedError, match="does not take label_smoothing"):
        chunked_log_probs(model, input_ids=IDS, labels=LABELS, label_smoothing=0.1)
    mask = torch.ones_like(IDS)
    mask[:, -3:] = 0
    with pytest.raises(ValueError, match="padding whose labels count"):
        chunked_log_probs(model, input_ids=IDS, labels=LABELS, attention_mask=mask)
    handle.remove()
    apply_fpdt(model, FPDTPlugin(sp_size=2, chunk_tokens=8), SequenceParallelGroup(size=2))
    embedded = model.get_input_embeddings()(IDS)
    for given in ({"inputs_embeds": embedded}, {"input_ids": IDS, "pixel_values": embedded[:1]}):
        with pytest.raises(NotImplementedError, match="rows of token ids are cut over ranks, and .*set sp_size=1"):
            chunked_log_probs(model, labels=LABELS, **given)
