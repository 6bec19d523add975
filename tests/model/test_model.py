"""apply_fpdt on whole models: the same loss, gradients, outputs and tokens as the model without it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from tests.helpers.models import (
    CHUNK,
    PLUGIN,
    TOLERANCE,
    TOLERANCE_FP32,
    Step,
    assert_same_step,
    broken_steps,
    taken_step,
    tiny,
    tokens,
    train_step,
)
from tests.helpers.support import assert_as_accurate, assert_rejects, max_error

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def applied(*args: Any, plugin: FPDTPlugin = PLUGIN, **kwargs: Any) -> PreTrainedModel:
    """`tiny(…)` with FPDT."""
    model = tiny(*args, **kwargs)
    apply_fpdt(model, plugin)
    return model


def with_lora(model: PreTrainedModel, **config: Any) -> PeftModel:
    """The model with adapters that do something from the first step; equal models get equal ones."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**LORA, **config}), autocast_adapter_dtype=False)


# -- loss and gradients -----------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "gpt_neox, parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
}
PLUGINS = {
    "ragged chunks": PLUGIN,
    "attention run again": FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints="input"),
    "math kernel": FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, kernel="math"),
    "one chunk": FPDTPlugin(),
    "a token a chunk": FPDTPlugin(chunk_tokens=1, loss_chunk_tokens=1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "length"), [(1, 18), (3, 63), (1, 130)])
def test_a_step_equals_sdpa(name: str, batch: int, length: int) -> None:
    architecture, config = MODELS[name]
    ids = tokens(batch, length)
    reference = tiny(architecture, **config)
    truth = train_step(reference, ids)
    assert_same_step(train_step(applied(architecture, **config), ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken_steps(reference, ids))


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_step_equals_sdpa_with_every_plugin(plugin: str) -> None:
    ids = tokens(2, 37)
    truth = train_step(tiny(), ids)
    assert_same_step(train_step(applied(plugin=PLUGINS[plugin]), ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken_steps(tiny(), ids))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["apply_fpdt", "get_peft_model"])
def test_a_lora_step_equals_sdpa(name: str, first: str) -> None:
    architecture, config = MODELS[name]
    ids = tokens(2, 37)
    reference = with_lora(tiny(architecture, **config))
    truth = train_step(reference, ids)
    if first == "apply_fpdt":
        model = with_lora(applied(architecture, **config))
    else:
        model = with_lora(tiny(architecture, **config))
        apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken_steps(reference, ids))


def test_lora_dropout_is_drawn_again_in_backward() -> None:
    """With a mask drawn anew in backward the gradients would not be those of the loss."""
    model = with_lora(applied(), lora_dropout=0.5)
    ids = tokens(2, 37)
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.0" in n and "v_proj.lora_B" in n)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model(input_ids=ids, labels=ids).loss

    step = taken_step(model, _backward(loss()))
    direction, size = torch.randn_like(weight), 1e-3
    with torch.no_grad():
        ends = []
        for sign in (size, -2 * size):
            weight.add_(sign * direction)
            ends.append(loss())
    measured = (ends[0] - ends[1]) / (2 * size)

    def check(grad: Tensor) -> None:
        assert torch.isclose((grad * direction).sum(), measured, rtol=1e-3)

    check(step.grads[name])
    with torch.no_grad():
        weight.add_(size * direction)
    other = train_step(model, ids).grads[name]  # another mask
    assert_rejects(check, {"another mask": other})


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def test_right_padding_is_exact_and_padded_labels_must_not_count() -> None:
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, 29:] = mask[2, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    truth = train_step(tiny(), ids, labels, attention_mask=mask)
    model = applied()
    assert_same_step(train_step(model, ids, labels, attention_mask=mask), truth)
    assert_rejects(lambda s: assert_same_step(s, truth), broken_steps(tiny(), ids, labels))
    with pytest.raises(ValueError, match="labels of padding to -100"):
        model(input_ids=ids, labels=ids, attention_mask=mask)


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_is_as_accurate_as_sdpa_in_bf16(lora: bool) -> None:
    ids = tokens(2, 63)

    def step(dtype: torch.dtype, fpdt: bool) -> Step:
        model: nn.Module = tiny(dtype=torch.bfloat16)
        model = with_lora(model) if lora else model
        if fpdt:
            apply_fpdt(model, PLUGIN)
        return train_step(model.to(dtype), ids)

    truth, naive, ours = step(torch.float64, False), step(torch.bfloat16, False), step(torch.bfloat16, True)
    assert_as_accurate(ours.loss, naive.loss, truth.loss.double(), name="loss")
    assert ours.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        assert_as_accurate(ours.grads[name], naive.grads[name], grad, name=name)


def train_selected(model: PreTrainedModel, selected: str) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(selected in name)
    return model


@pytest.mark.parametrize("selected", ["layers.0", "layers.1", "self_attn.q_proj", "mlp", "norm", "lm_head", "embed"])
def test_only_what_is_trainable_gets_a_gradient(selected: str) -> None:
    ids = tokens(2, 37)
    truth = train_step(train_selected(tiny(), selected), ids)
    assert_same_step(train_step(train_selected(applied(), selected), ids), truth)


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_embeddings_that_are_to_want_gradients_for_checkpoints_do_not(name: str) -> None:
    """Autograd would hold them through the step, and make gradients of them; Granite scales them before the layers."""
    ids, held = tokens(2, 37), list[StorageWeakRef]()

    def step(*, seen: bool, **plugin: Any) -> tuple[Step, bool]:
        model: Any = train_selected(tiny(name), "proj")
        if plugin:
            apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, **plugin))
        embed, given = model.get_input_embeddings(), list[Tensor]()
        forward = embed.forward

        def noted(ids: Tensor) -> Tensor:
            held.append(StorageWeakRef((output := forward(ids)).untyped_storage()))
            return output

        embed.forward = noted
        if seen:
            embed.register_forward_hook(lambda _, __, output: given.append(output))
        for _ in range(2):  # PEFT does, then TRL
            model.enable_input_require_grads()
        loss = model(input_ids=ids, labels=ids).loss
        is_held = not held[-1].expired()
        loss.backward()
        assert len(embed._forward_hooks) == 2 + seen, "as they were"
        return taken_step(model, loss), is_held if not given else given[0].grad is not None

    truth, is_held = step(seen=False)
    assert is_held, "or the test sees nothing"
    ours, is_held = step(seen=False, device_budget_gib=0)
    assert not is_held
    assert_same_step(ours, truth)
    assert step(seen=True, device_budget_gib=0)[1], "somebody looks: they get their gradients"


@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
def test_autocast_trains_every_parameter_as_sdpa_does(inside: bool) -> None:
    ids = tokens(2, 63)

    def step(model: PreTrainedModel) -> Step:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
            if inside:
                loss.backward()
        return taken_step(model, loss if inside else _backward(loss))

    truth = train_step(tiny(), ids)
    naive, ours = (step(model) for model in (tiny(dtype=torch.float32), applied(dtype=torch.float32)))
    assert ours.grads.keys() == truth.grads.keys()
    assert_as_accurate(ours.loss, naive.loss, truth.loss.double(), name="loss")
    for name, grad in truth.grads.items():
        assert_as_accurate(ours.grads[name], naive.grads[name], grad, name=name)


# -- models with another head, or none --------------------------------------------------------------------------------


def test_a_base_model_without_head_equals_sdpa() -> None:
    ids = tokens(2, 37)

    def step(model: PreTrainedModel) -> Step:
        return taken_step(model, _backward(model(ids).last_hidden_state.logsumexp(-1).mean()))

    truth = step(tiny(auto=AutoModel))
    assert_same_step(step(applied(auto=AutoModel)), truth)
    assert_rejects(lambda s: assert_same_step(s, truth), {"another input": step_of_other_tokens(ids)})


def step_of_other_tokens(ids: Tensor) -> Step:
    model = tiny(auto=AutoModel)
    return taken_step(model, _backward(model(ids.roll(1, 1)).last_hidden_state.logsumexp(-1).mean()))


def test_sequence_classification_equals_sdpa() -> None:
    ids = tokens(3, 37)
    ids[1, 20:] = 0  # padding: the model reads its answer from the last real token
    labels = torch.tensor([1, 0, 2])
    auto = AutoModelForSequenceClassification
    models = [make(auto=auto, num_labels=3) for make in (applied, tiny)]
    ours, theirs = (train_step(m, ids, labels, attention_mask=(ids != 0).long()) for m in models)
    assert_same_step(ours, theirs)
    assert models[0](input_ids=ids).logits.shape == (3, 3)


# -- what the model returns -------------------------------------------------------------------------------------------


def test_with_labels_the_output_is_the_loss_without_logits() -> None:
    ids = tokens(2, 23)
    model, reference = applied(), tiny()
    ours, theirs = (m(input_ids=ids, labels=ids) for m in (model, reference))
    assert type(ours) is type(theirs)
    assert list(ours.keys()) == ["loss"] and ours.logits is None and ours.past_key_values is None
    assert ours[0] is ours.loss and ours["loss"] is ours.loss
    as_tuple = model(input_ids=ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == ()
    assert torch.equal(as_tuple[0], ours.loss)
    assert model(input_ids=ids, labels=ids, return_dict=None).loss is not None


def test_without_labels_the_output_is_that_of_sdpa() -> None:
    ids = tokens(2, 23)
    ours, theirs = (m.eval()(input_ids=ids, output_hidden_states=True) for m in (applied(), tiny()))
    assert list(ours.keys()) == list(theirs.keys())
    assert max_error(ours.logits, theirs.logits) < TOLERANCE * theirs.logits.abs().max()


@pytest.mark.parametrize("kept", [1, 5, 0, torch.tensor([2, 11])], ids=str)
@pytest.mark.parametrize("labels", [True, False])
def test_logits_to_keep_gives_those_logits(kept: int | Tensor, labels: bool) -> None:
    ids = tokens(2, 23)
    arguments = {"labels": ids} if labels else {}
    model = applied()
    with torch.no_grad():
        whole = tiny()(ids).logits
        truth = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
        outputs = model(ids, logits_to_keep=kept, **arguments)
    assert max_error(outputs.logits, truth) < TOLERANCE * whole.abs().max()
    assert list(outputs.keys())[: 1 + labels] == (["loss", "logits"] if labels else ["logits"])
    if labels:
        assert torch.equal(outputs.loss, model(ids, labels=ids).loss)


def test_hidden_states_are_whole_and_those_of_sdpa() -> None:
    ids = tokens(2, 23)
    ours, theirs = (m(input_ids=ids, labels=ids, output_hidden_states=True) for m in (applied(), tiny()))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert max_error(mine, other) < TOLERANCE * other.abs().max()


def test_a_loss_on_the_logits_trains_as_well() -> None:
    """Trainer's label smoothing takes the labels away and computes its own loss."""
    ids = tokens(2, 37)

    def step(model: PreTrainedModel) -> Step:
        return taken_step(model, _backward(model(input_ids=ids).logits.logsumexp(-1).square().mean()))

    assert_same_step(step(applied()), step(tiny()))


@pytest.mark.parametrize(
    ("name", "value"), [("weight", torch.ones(80)), ("label_smoothing", 0.1), ("reduction", "sum"), ("reduce", False)]
)
def test_an_argument_that_the_loss_does_not_hear_is_refused_by_name(name: str, value: Any) -> None:
    """Transformers' own loss drops them in silence, today."""
    ids, model = tokens(1, 23), applied()
    with pytest.raises(NotImplementedError, match=f"does not take {name}, only labels, .*without labels"):
        model(input_ids=ids, labels=ids, **{name: value})
    assert model(input_ids=ids, **{name: value}).logits is not None, "without labels there is no loss to hear it"
    as_it_is: dict[str, Any] = {"weight": None, "label_smoothing": 0.0, "reduction": "mean"}
    ours = train_step(model, ids, output_hidden_states=False, **as_it_is)
    assert_same_step(ours, train_step(tiny(), ids))


def test_tokens_can_be_predicted_in_slices() -> None:
    """As docs/troubleshooting.md has it, for metrics of which one process has the whole logits."""
    ids, model = tokens(2, 37), applied().eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = torch.cat([model.get_output_embeddings()(part).argmax(-1) for part in hidden.split(7, dim=1)], dim=1)
        assert torch.equal(found, tiny().eval()(input_ids=ids).logits.argmax(-1))


LOSS_ARGUMENTS: dict[str, dict[str, Any]] = {
    "num_items_in_batch": {"num_items_in_batch": 117},
    "num_items_in_batch as a tensor": {"num_items_in_batch": torch.tensor(117)},
    "shift_labels": {"shift_labels": tokens(2, 37, seed=3)},
    "ignore_index": {"ignore_index": 11},
}


@pytest.mark.parametrize("case", LOSS_ARGUMENTS)
def test_an_argument_of_the_loss_acts_as_in_transformers(case: str) -> None:
    ids = tokens(2, 37)
    labels = ids.masked_fill(ids < 20, 11 if case == "ignore_index" else -100)
    truth = train_step(tiny(), ids, labels, **LOSS_ARGUMENTS[case])
    assert_same_step(train_step(applied(), ids, labels, **LOSS_ARGUMENTS[case]), truth)
    plain = train_step(tiny(), ids, labels.masked_fill(labels == 11, 12))
    assert_rejects(lambda s: assert_same_step(s, truth), {"argument not heard": plain})


def test_without_any_label_the_loss_is_nan_as_in_transformers() -> None:
    ids = tokens(1, 23)
    nothing = torch.full_like(ids, -100)
    for items in ({}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 0}):
        step = train_step(applied(), ids, nothing, **items)
        assert step.loss.isnan() and step.grads and not any(grad.any() for grad in step.grads.values())
    theirs = train_step(tiny(), ids, nothing)
    assert theirs.loss.isnan() and not any(grad.any() for grad in theirs.grads.values())
    assert train_step(applied(), ids, num_items_in_batch=0).loss.isinf(), "labels that count, over nothing"


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_scaling_the_loss_scales_the_gradients(factor: float) -> None:
    ids = tokens(2, 37)
    model = applied()
    truth = train_step(model, ids)
    loss = model(input_ids=ids, labels=ids).loss
    loss = loss * factor
    step = taken_step(model, _backward(loss))
    unscaled = Step(step.loss / factor, {name: grad / factor for name, grad in step.grads.items()})
    assert_same_step(unscaled, truth, tolerance=1e-12)


def test_gradients_accumulate_over_steps() -> None:
    first, second = tokens(2, 37), tokens(1, 20, seed=1)

    def accumulated(model: PreTrainedModel) -> Step:
        for ids in (first, second):
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
        return taken_step(model, loss)

    assert_same_step(accumulated(applied()), accumulated(tiny()))


# -- autograd ---------------------------------------------------------------------------------------------------------


def test_two_forward_passes_before_two_backward_passes() -> None:
    first, second = tokens(2, 37), tokens(1, 20, seed=1)

    def steps(model: PreTrainedModel) -> Step:
        losses = [model(input_ids=ids, labels=ids).loss for ids in (first, second)]
        for loss in losses:
            loss.backward()
        return taken_step(model, losses[0] + losses[1])

    assert_same_step(steps(applied()), steps(tiny()))


def test_one_backward_pass_over_two_forward_passes() -> None:
    ids = tokens(2, 37)

    def step(model: PreTrainedModel) -> Step:
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
        return taken_step(model, _backward(sum(losses)))

    assert_same_step(step(applied()), step(tiny()))


def in_another_thread(act: Callable[[], Any]) -> str:
    """The error that it raised there, or ""."""
    said: list[str] = []

    def run() -> None:
        try:
            act()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return said[0]


@pytest.mark.parametrize("second", ["forward", "evaluation", "backward"])
def test_a_second_thread_in_the_middle_of_a_step_is_refused_and_the_step_goes_on(second: str) -> None:
    ids, other = tokens(1, 23), tokens(1, 16, seed=1)
    model = applied()
    logits = model(input_ids=other).logits  # those of labels are used up by a first try

    def act() -> None:
        if second == "backward":
            torch.autograd.grad(logits.sum(), [model.model.embed_tokens.weight], retain_graph=True)
        with torch.set_grad_enabled(second == "forward"):
            model(input_ids=other, use_cache=False)

    said: dict[str, str] = {}

    def in_the_middle(*_: Any) -> None:
        phase = "backward" if torch.is_grad_enabled() else "forward"
        if threading.current_thread().name != "second" and phase not in said:
            said[phase] = in_another_thread(act)

    hook = model.model.layers[0].mlp.register_forward_pre_hook(in_the_middle)
    ours = train_step(model, ids)
    hook.remove()
    assert said.keys() == {"forward", "backward"}
    for line in said.values():
        assert "already running a step in another thread: 'second' came to layer" in line
        assert "'MainThread' is in layer 0 (LlamaDecoderLayer)" in line and "accelerate launch" in line
    assert_same_step(ours, train_step(tiny(), ids))
    assert_same_step(train_step(model, ids), ours)


def test_a_thread_may_generate_in_the_middle_of_a_step_and_another_one_runs_backward() -> None:
    ids = tokens(1, 23)
    model, plain = applied(), tiny()
    answers: list[Tensor] = []

    def generate(model: PreTrainedModel = model) -> None:
        answers.append(model.generate(ids[:, :5], max_new_tokens=3, do_sample=False))

    def in_the_middle(*_: Any) -> None:
        if threading.current_thread().name != "second" and not answers:
            assert in_another_thread(generate) == ""

    hook = model.model.layers[1].mlp.register_forward_pre_hook(in_the_middle)
    loss = model(input_ids=ids, labels=ids).loss
    hook.remove()
    generate(plain)
    assert torch.equal(*answers)
    assert in_another_thread(loss.backward) == ""
    assert_same_step(taken_step(model, loss), train_step(plain, ids))


@pytest.mark.parametrize("through", ["loss", "logits"])
def test_backward_twice_says_to_run_forward_again(through: str) -> None:
    ids = tokens(1, 23)
    model = applied()
    loss = model(input_ids=ids, labels=ids).loss if through == "loss" else model(input_ids=ids).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="[Rr]un the forward pass again"):
        loss.backward()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_weight_changed_between_forward_and_backward_raises(name: str) -> None:
    ids = tokens(1, 23)
    model = applied()
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 4}
INPLACE = "a weight of layer .* was modified by an inplace operation between forward and backward"


def with_adapted_experts(plugin: FPDTPlugin | None) -> PeftModel:
    """PEFT's adapters of parameters, over the matrix products of groups that transformers takes by itself (fp32)."""
    model = tiny("qwen3_moe", dtype=torch.float32, attention="sdpa", **EXPERTS)
    model.set_experts_implementation("grouped_mm")
    adapted = with_lora(model)
    if plugin is not None:
        apply_fpdt(adapted, plugin)
    return adapted


@pytest.mark.parametrize("checkpoints", ["attention", "segment"])
def test_weights_that_a_layer_puts_aside_and_back_are_unchanged(checkpoints: Any) -> None:
    """A layer below runs again in backward ("segment"); a second forward comes before the first one's backward."""
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints)

    def both(model: PeftModel) -> Step:
        one, two = (model(input_ids=ids, labels=ids).loss for ids in (tokens(1, 23), tokens(1, 19, seed=1)))
        loss = one + 2 * two
        loss.backward()
        return taken_step(model, loss)

    ours, plain = (both(with_adapted_experts(each)) for each in (plugin, None))
    assert sum("experts" in name for name in plain.grads) == 4 * 4
    assert_same_step(ours, plain, tolerance=TOLERANCE_FP32)


def test_changing_one_of_them_between_forward_and_backward_raises() -> None:
    ids = tokens(1, 23)
    model = with_adapted_experts(PLUGIN)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        next(
            p for name, p in model.named_parameters() if name.endswith("experts.base_layer.base_layer.down_proj")
        ).add_(1)
    with pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


HOOKED = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")


def test_hooks_of_parameters_run_once_on_the_whole_gradient() -> None:
    ids = tokens(2, 37)
    model, reference = applied(), tiny()
    calls = {name: [0, 0] for name in HOOKED}

    def hook(model: PreTrainedModel, name: str, count: list[int]) -> None:
        def doubled(grad: Tensor) -> Tensor:
            count[0] += 1
            return 2 * grad

        def after(_: Tensor) -> None:
            count[1] += 1

        parameter = model.get_parameter(name)
        parameter.register_hook(doubled)
        parameter.register_post_accumulate_grad_hook(after)

    for name in HOOKED:
        hook(model, name, calls[name])
        hook(reference, name, [0, 0])
    plain = train_step(tiny(), ids)
    truth = train_step(reference, ids)
    assert_same_step(train_step(model, ids), truth)
    assert calls == {name: [1, 1] for name in HOOKED}
    assert_rejects(lambda s: assert_same_step(s, truth), {"hooks not run": plain})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_evaluation_gives_the_loss_of_sdpa(mode: Any, training: bool) -> None:
    ids = tokens(2, 37)
    model = applied().train(training)
    with mode():
        ours, theirs = (m(input_ids=ids, labels=ids).loss for m in (model, tiny()))
    assert not ours.requires_grad
    assert max_error(ours, theirs) < TOLERANCE * theirs.abs()
    assert_same_step(train_step(model, ids), train_step(tiny(), ids))  # and nothing of it is left behind


def test_an_evaluation_that_needs_a_mask_is_exact_without_gradients() -> None:
    ids, mask = tokens(2, 37), torch.ones(2, 37, dtype=torch.long)
    mask[0, :9] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model, reference = applied().eval(), tiny().eval()
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, labels=labels, attention_mask=mask).loss for m in (model, reference))
    assert max_error(ours, theirs) < TOLERANCE * theirs.abs()
    with pytest.raises(NotImplementedError, match="[Pp]ad on the right"):
        model(input_ids=ids, labels=labels, attention_mask=mask)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_generate_between_two_steps_gives_the_tokens_of_sdpa(training: bool, lora: bool, how: dict[str, Any]) -> None:
    """Also where nobody called eval(): a model in training mode keeps its cache while it generates."""
    ids, mask = tokens(2, 37), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    model, reference = (with_lora(m) if lora else m for m in (applied(), tiny()))
    first = train_step(model, ids)
    made = [
        m.train(training).generate(
            input_ids=ids[:, :11], attention_mask=mask, max_new_tokens=9, do_sample=False, **how
        )
        for m in (model, reference)
    ]
    assert torch.equal(*made)
    assert_same_step(train_step(model.train(), ids), first, tolerance=0.0)


# -- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["never", "before", "after"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformers_checkpointing_costs_nothing_and_changes_nothing(when: str, use_reentrant: bool) -> None:
    """Its recomputation around ours would run every chunk once more."""
    ids = tokens(2, 37)
    model = tiny()

    def enable() -> None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()

    if when == "before":
        enable()
    apply_fpdt(model, PLUGIN)
    if when == "after":
        enable()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.model.layers[0].mlp.register_forward_hook(count)
    train_step(model, ids)  # with the trial of a layer that has a hook now
    runs = 0
    assert_same_step(train_step(model, ids), train_step(tiny(), ids))
    chunks = -(-ids.shape[1] // CHUNK)
    assert runs == 2 * chunks, "once forward and once in backward for each chunk"


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    """Of a tensor that a hook brings into a layer; where it is a parameter of a module there, nothing is lost."""
    ids, steps = tokens(2, 37), []
    for fpdt, registered in ((False, True), (True, True), (True, False)):
        model = applied() if fpdt else tiny()
        mlp, shift = model.model.layers[1].mlp, nn.Parameter(torch.full_like(model.model.norm.weight, 0.1))
        if registered:
            mlp.shift = shift
        mlp.register_forward_hook(lambda module, args, output, shift=shift: output + shift)
        if registered:
            steps.append(train_step(model, ids))
        else:
            with pytest.raises(RuntimeError, match=r"tensor of shape \(.*its gradient would be lost"):
                train_step(model, ids)
    assert_same_step(steps[1], steps[0])
    assert steps[0].grads["model.layers.1.mlp.shift"].any()


HEAD_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda head: head.register_forward_hook(lambda module, args, output: output * 0.5),
    "before": lambda head: head.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,)),
}


@pytest.mark.parametrize("case", HEAD_HOOKS)
def test_hooks_of_the_head_act_on_every_chunk(case: str) -> None:
    ids, (model, reference) = tokens(2, 37), (applied(), tiny())
    plain = train_step(reference, ids)
    for each in (model, reference):
        HEAD_HOOKS[case](each.lm_head)
    truth = train_step(reference, ids)
    assert_same_step(train_step(model, ids), truth)
    assert_rejects(lambda s: assert_same_step(s, truth), {"hook not run": plain})


def test_a_gradient_that_the_head_would_lose_is_refused() -> None:
    model, shift = applied(), nn.Parameter(torch.ones((), dtype=torch.float64))
    model.lm_head.register_forward_hook(lambda module, args, output: output * shift)
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        train_step(model, tokens(2, 37))


# -- life of a model --------------------------------------------------------------------------------------------------


def test_the_state_dict_has_the_same_keys_and_tensors() -> None:
    model = tiny()
    before = model.state_dict()
    apply_fpdt(model, PLUGIN)
    after = model.state_dict()
    assert list(after) == list(before) and all(after[key].data_ptr() == before[key].data_ptr() for key in before)


def test_a_saved_model_is_stock(tmp_path: Path) -> None:
    ids = tokens(2, 37)
    model = applied(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert "fpdt" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == [type(tiny()).__name__]
    with torch.no_grad():
        assert max_error(loaded(ids).logits, tiny(dtype=torch.float32)(ids).logits) == 0.0
    apply_fpdt(loaded.train(), PLUGIN)
    assert_same_step(train_step(loaded, ids), train_step(model, ids), tolerance=0.0)


def test_a_deep_copy_works_and_is_independent() -> None:
    ids = tokens(2, 37)
    model = tiny()
    handle = apply_fpdt(model, PLUGIN)
    truth = train_step(model, ids)
    twin, twin_handle = copy.deepcopy((model, handle))
    assert_same_step(train_step(twin, ids), truth, tolerance=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    handle.remove()
    assert_same_step(train_step(twin, ids), truth, tolerance=0.0)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    twin.model.layers[0].mlp.register_forward_hook(count)
    train_step(twin, ids)  # with the trial of a layer that has a hook now
    runs = 0
    train_step(twin, ids)
    assert runs == 2 * -(-ids.shape[1] // CHUNK), "the copy still runs in chunks"
    twin_handle.remove()
    assert type(twin.model.layers[0]) is type(tiny().model.layers[0])


def test_a_module_moved_to_another_dtype_after_apply_works() -> None:
    ids = tokens(2, 37)
    assert_same_step(train_step(applied(dtype=torch.float32).double(), ids), train_step(tiny(), ids))


def test_layers_of_transformers_are_still_found_by_their_class_name() -> None:
    """Accelerate wraps layers by the name of their class, and by isinstance."""
    layers, stock = applied().model.layers, type(tiny().model.layers[0])
    assert all(type(layer).__name__ == stock.__name__ and isinstance(layer, stock) for layer in layers)
