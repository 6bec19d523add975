"""Layers are tried before they run in chunks: what mixes tokens is refused by name, what does not passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.trial import LayerTrials
from tests.helpers.models import (
    PLUGIN,
    TOLERANCE_FP32,
    Step,
    assert_same_step,
    taken_step,
    tiny,
    tokens,
    train_step,
)
from tests.helpers.recurrent import FAMILIES
from tests.helpers.support import assert_rejects

IDS = tokens(2, 37)
HIDDEN, INTERMEDIATE = 32, 48


def changed(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[PreTrainedModel], None]:
    """Puts a hook on the MLP of the last layer: `change(output, input)` is its output then."""

    def plant(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: change(y, args[0]))

    return plant


class Wrapped(nn.Module):
    """The MLP's activation, with something before it that sees all tokens."""

    def __init__(self, inner: nn.Module, before: Callable[[Tensor], Tensor], module: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.before, self.module = inner, before, module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x))


def before_activation(make: Callable[[], tuple[Callable[[Tensor], Tensor], nn.Module]]) -> Any:
    def plant(model: PreTrainedModel) -> None:
        mlp, (before, module) = model.model.layers[1].mlp, make()
        mlp.act_fn = Wrapped(mlp.act_fn, before, module.to(torch.float64).train())

    return plant


def batch_norm() -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    norm = nn.BatchNorm1d(INTERMEDIATE, track_running_stats=False)
    return lambda x: norm(x.transpose(1, 2)).transpose(1, 2), norm


def convolution() -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    conv = nn.Conv1d(INTERMEDIATE, INTERMEDIATE, 3, padding=2)
    return lambda x: conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2), conv


class Remembers(nn.Module):
    """Adds the last token of the call before: of the chunk before, in chunks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x + self.last)
        self.last = x[:, -1:].detach()
        return y


def remembers(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    mlp.act_fn = Remembers(mlp.act_fn)


def old_spectral_norm(model: PreTrainedModel) -> None:
    torch.nn.utils.spectral_norm(model.model.layers[1].mlp.down_proj)


def new_spectral_norm(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.model.layers[1].mlp.down_proj)


def with_places(y: Tensor, _: Tensor) -> Tensor:
    return y + 0.1 * torch.arange(y.shape[1], dtype=y.dtype, device=y.device).sin()[:, None]


def self_attention(y: Tensor, x: Tensor) -> Tensor:
    return y + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


MIXERS: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "batch norm": (before_activation(batch_norm), r"other tokens .* first in mlp.act_fn"),
    "causal convolution": (before_activation(convolution), r"other tokens .* first in mlp.act_fn"),
    "the token before": (changed(lambda y, x: y + x.roll(1, 1)), r"other tokens .* first in mlp \("),
    "a running mean without gradient": (changed(lambda y, x: y + x.detach().cumsum(1)), r"first in mlp \("),
    "one scale for all tokens": (changed(lambda y, x: y * x.detach().abs().amax()), r"first in mlp \("),
    "a little of the mean": (changed(lambda y, x: y + 1e-6 * x.mean(1, keepdim=True)), "other tokens"),
    "softmax over tokens": (changed(lambda y, x: y * x.softmax(1)), r"first in mlp \("),
    "attention of its own": (changed(self_attention), r"first in mlp \("),
    "places in the chunk": (changed(with_places), "a token's place"),
    "what was last time": (remembers, "other tokens|a token's place"),
    "spectral norm": (old_spectral_norm, "its buffer weight_u"),
    "spectral norm as parametrization": (new_spectral_norm, "its buffer _u"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_tokens_in_a_layer_is_refused_when_it_is_switched_on(name: str) -> None:
    plant, reason = MIXERS[name]
    model = tiny().eval()
    plant(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        NotImplementedError, match=rf"layer 1 \(LlamaDecoderLayer\) cannot be run in chunks: .*{reason}"
    ):
        apply_fpdt(model, PLUGIN)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in (model, model.model, model.model.layers[0].mlp))


@pytest.mark.parametrize("name", ["the token before", "batch norm", "what was last time"])
def test_what_mixes_tokens_is_refused_where_it_is_put_in_after(name: str) -> None:
    plant, reason = MIXERS[name]
    model = tiny()
    apply_fpdt(model, PLUGIN)
    train_step(model, IDS)
    plant(model)
    with pytest.raises(NotImplementedError, match=reason):
        train_step(model, IDS)


@pytest.mark.parametrize("layer_types", [["full_attention"], ["linear_attention", "full_attention"]])
def test_a_reentrant_checkpoint_in_a_layer_is_refused_with_the_way_out(layer_types: list[str]) -> None:
    hybrid = {**FAMILIES["qwen3_5_text"], "layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    model = tiny("qwen3_5_text", **hybrid)
    mlp = model.model.layers[0].mlp
    own = type(mlp).forward
    mlp.forward = lambda x: checkpoint(own, mlp, x, use_reentrant=True)
    with pytest.raises(NotImplementedError, match="layer 0 .*use_reentrant=False"):
        apply_fpdt(model, PLUGIN)
    mlp.forward = lambda x: checkpoint(own, mlp, x, use_reentrant=False)
    truth = train_step(model, IDS)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS), truth, TOLERANCE_FP32)


def test_what_mixes_tokens_in_training_alone_may_be_evaluated() -> None:
    """Batch norm that has learned its statistics acts on each token alone."""
    model = tiny()
    apply_fpdt(model, PLUGIN)
    norm = nn.BatchNorm1d(INTERMEDIATE, dtype=torch.float64)
    mlp = model.model.layers[1].mlp
    mlp.act_fn = Wrapped(mlp.act_fn, lambda x: norm(x.transpose(1, 2)).transpose(1, 2), norm)
    with pytest.raises(NotImplementedError, match="its buffer .* changes"):
        train_step(model, IDS)
    ours = train_step(model.eval(), IDS)
    reference = tiny().eval()
    reference.model.layers[1].mlp.act_fn = mlp.act_fn
    assert_same_step(ours, train_step(reference, IDS))


def velora(init: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["down_proj"], velora_config=VeloraConfig(num_groups=4, init_type=init))


def test_adapters_that_average_over_the_batch_are_refused() -> None:
    """Their gradients are no sums over tokens, or what they average changes with each call."""
    model = get_peft_model(tiny(), velora("batch_average"))
    with pytest.raises(NotImplementedError, match="lora_velora_embed|buffer|no sum over tokens"):
        apply_fpdt(model, PLUGIN)


def lora(**config: Any) -> Callable[[PreTrainedModel], PeftModel]:
    return lambda model: get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", **config), autocast_adapter_dtype=False
    )


PASSES: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "LoRA": lora(),
    "LoRA with dropout": lora(lora_dropout=0.5),
    "DoRA": lora(use_dora=True),
    "rank-stabilised LoRA": lora(use_rslora=True),
    "VeLoRA with a random projection": lambda model: get_peft_model(model, velora("random")),
}


@pytest.mark.parametrize("name", PASSES)
def test_adapters_that_act_on_each_token_pass(name: str) -> None:
    """Before FPDT is applied, and put in after."""
    torch.manual_seed(0)
    model = PASSES[name](tiny())
    apply_fpdt(model, PLUGIN)
    late = tiny()
    apply_fpdt(late, PLUGIN)
    for each in (model, PASSES[name](late)):
        before = {key: value.clone() for key, value in each.state_dict().items()}
        assert train_step(each, IDS).loss.isfinite()
        assert all(torch.equal(before[key], value) for key, value in each.state_dict().items()), "weights were changed"


def test_random_numbers_are_left_alone() -> None:
    model = lora(lora_dropout=0.5)(tiny())
    state = torch.get_rng_state()
    apply_fpdt(model, PLUGIN)
    assert torch.equal(torch.get_rng_state(), state)
    untried = copy.deepcopy(model)
    for module in untried.modules():
        if hasattr(module, "_fpdt_looks"):
            module._fpdt_looks = set()
            module._fpdt_settings.trials = LayerTrials()
    steps = []
    for each in (model, untried):
        torch.manual_seed(3)
        steps.append(train_step(each, IDS))
    assert_same_step(steps[0], steps[1], tolerance=0.0)


def test_layers_of_one_kind_are_tried_once_and_steps_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    check = LayerTrials.check

    def noted(self: LayerTrials, *args: Any) -> Any:
        tried.append(args[0])
        return check(self, *args)

    monkeypatch.setattr(LayerTrials, "check", noted)
    model = tiny(num_hidden_layers=4)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=8))
    assert len(handle._settings.trials.passed) == 1
    model.eval()
    tried.clear()
    for _ in range(2):
        model.train()
        train_step(model, IDS)
    assert not tried


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_bfloat16_passes_with_as_little_as_rounding_leaves(name: str) -> None:
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    for seed in range(3):
        model = tiny(name, dtype=torch.bfloat16, **(experts if name != "llama" else {}))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        apply_fpdt(model, PLUGIN)


def test_a_model_without_weights_is_tried_at_its_first_step() -> None:
    with torch.device("meta"):
        empty = tiny()
    MIXERS["the token before"][0](empty)
    apply_fpdt(empty, PLUGIN)
    empty.to_empty(device="cpu").load_state_dict(tiny().state_dict())
    empty.model.rotary_emb = tiny().model.rotary_emb
    with pytest.raises(NotImplementedError, match="depends on other tokens"):
        train_step(empty, IDS)


# -- beside the layers ------------------------------------------------------------------------------------------------


class MeanNorm(nn.Module):
    """A norm over the tokens, where there should be one over the width."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Looks(nn.Linear):
    """A head that looks at the token before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(1, 1))


def test_a_final_norm_and_a_head_that_mix_tokens_are_refused() -> None:
    model = tiny()
    model.model.norm = MeanNorm()
    with pytest.raises(NotImplementedError, match=r"final norm \(MeanNorm\) looks at other tokens"):
        apply_fpdt(model, PLUGIN)
    model = tiny()
    model.lm_head = Looks(HIDDEN, 80, bias=False, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="the head of LlamaForCausalLM looks at other tokens"):
        apply_fpdt(model, PLUGIN)


def padded_batch() -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[1, 20:] = 0
    return {"input_ids": IDS * mask, "attention_mask": mask}  # 0 is the padding token


@pytest.mark.parametrize("grad", [True, False])
def test_a_head_that_reads_padding_is_refused_where_there_is_padding(grad: bool) -> None:
    """Its softmax is over all positions, and hidden states of padding are not those of a masked model."""
    model = tiny(auto=AutoModelForQuestionAnswering)
    places = {"start_positions": torch.tensor([3, 4]), "end_positions": torch.tensor([5, 9])}
    whole = {"input_ids": IDS, **places}
    truth = model(**whole).loss
    apply_fpdt(model, PLUGIN)
    with torch.set_grad_enabled(grad):
        assert torch.isclose(model(**whole).loss, truth, rtol=1e-6)
        with pytest.raises(NotImplementedError, match="head of LlamaForQuestionAnswering reads padding"):
            model(**padded_batch(), **places)


def test_a_head_that_does_not_read_padding_is_trained_on_padded_rows() -> None:
    batch = {**padded_batch(), "labels": torch.tensor([0, 1])}
    config: dict[str, Any] = {"auto": AutoModelForSequenceClassification, "num_labels": 2}
    model, reference = tiny(**config), tiny(**config)
    apply_fpdt(model, PLUGIN)
    for _ in range(2):
        steps = []
        for each in (model, reference):
            loss = each(**batch).loss
            loss.backward()
            steps.append(taken_step(each, loss))
        assert_same_step(steps[0], steps[1])


# -- what a trial cannot see ------------------------------------------------------------------------------------------


def twice_in_the_stack(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    return model


def entered_twice(model: PreTrainedModel) -> PreTrainedModel:
    inside: list[bool] = []

    def again(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if inside:
            return output
        inside.append(True)
        try:
            return layer(output, *args[1:], **kwargs)
        finally:
            inside.clear()

    model.model.layers[0].register_forward_hook(again, with_kwargs=True)
    return model


@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
@pytest.mark.parametrize("twice", [twice_in_the_stack, entered_twice])
def test_a_layer_that_a_pass_goes_through_twice_is_exact(twice: Any, checkpoints: str) -> None:
    truth = train_step(twice(tiny()), IDS, use_cache=False)
    model = twice(tiny())
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=8, checkpoints=checkpoints))
    assert_same_step(train_step(model, IDS), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), {"once": train_step(tiny(), IDS)})
    handle.remove()
    assert_same_step(train_step(model, IDS, use_cache=False), truth)


def test_a_layer_put_in_after_apply_is_refused() -> None:
    model = tiny()
    handle = apply_fpdt(model, PLUGIN)
    own = model.model.layers[1]
    model.model.layers[1] = tiny().model.layers[1]
    with pytest.raises(RuntimeError, match=r"layer 1 \(LlamaDecoderLayer\) was put there after apply_fpdt"):
        model(input_ids=IDS, labels=IDS)
    model.model.layers[1] = copy.deepcopy(own)
    with pytest.raises(RuntimeError, match="layer 1 .* was put there"):
        model(input_ids=IDS, labels=IDS)
    model.model.layers[1] = own
    assert_same_step(train_step(model, IDS), train_step(tiny(), IDS))
    handle.remove()


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_are_put_in_for_the_forward_pass_alone_are_refused(frozen: bool) -> None:
    """The replay would take the module's own; where backward runs while they are in place, it is exact."""

    def step(model: PreTrainedModel, *, inside: bool) -> Step:
        values = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        arguments = {"input_ids": IDS, "labels": IDS}
        if not inside:
            loss = functional_call(model, values, (), arguments).loss
            found = torch.autograd.grad(loss, list(values.values()))
            return Step(loss.detach(), dict(zip(values, found, strict=True)))
        grads: dict[str, Tensor] = {}

        class Inside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                loss = self.model(**arguments).loss
                found = torch.autograd.grad(loss, list(values.values()))
                grads.update(zip(values, found, strict=True))
                return loss

        loss = functional_call(Inside(), {f"model.{name}": value for name, value in values.items()})
        return Step(loss.detach(), grads)

    truth = step(tiny(), inside=False)
    model = tiny().requires_grad_(not frozen)
    apply_fpdt(model, PLUGIN)
    with pytest.raises(RuntimeError, match=r"layer 1 .* has other weights now than in forward"):
        step(model, inside=False)
    assert_same_step(step(model, inside=True), truth)


def test_saved_tensors_elsewhere_lose_no_gradient() -> None:
    """Hooks around saved tensors hand out copies of weights."""
    model = tiny()
    apply_fpdt(model, PLUGIN)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert_same_step(taken_step(model, loss), train_step(tiny(), IDS))


def test_backward_inside_an_autocast_that_forward_was_outside_of_loses_nothing() -> None:
    model = lora(init_lora_weights=False)(tiny(dtype=torch.float32))
    plain, apart = (one_step(model, autocast) for autocast in (False, True))
    apply_fpdt(model, PLUGIN)
    ours = one_step(model, True)
    assert_same_step(ours, one_step(model, False), tolerance=0.0)
    assert_same_step(ours, plain, TOLERANCE_FP32)
    assert_rejects(lambda step: assert_same_step(step, plain, TOLERANCE_FP32), {"transformers' own": apart})


def one_step(model: nn.Module, autocast: bool) -> Step:
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss.backward()
    return taken_step(model, loss)


# -- modules that PEFT copies -----------------------------------------------------------------------------------------

COPIES: dict[str, dict[str, Any]] = {
    "layers, with weights in common": {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj", "v_proj"]},
    "attention that is saved": {"modules_to_save": ["self_attn"], "target_modules": ["down_proj"]},
    "an MLP that is saved": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", COPIES)
def test_modules_that_peft_copies_are_exact(name: str) -> None:
    """Copies of attention have configurations of their own, which say which attention it is."""

    def wrapped(model: PreTrainedModel) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=4, init_lora_weights=False, **COPIES[name])
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    model = wrapped(tiny())
    truth = train_step(model, IDS, use_cache=False)
    handle = apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS), truth)
    handle.remove()
    assert_same_step(train_step(model, IDS, use_cache=False), truth, tolerance=0.0)
    late = tiny()
    apply_fpdt(late, PLUGIN)
    if "layer_replication" in COPIES[name]:
        with pytest.raises(RuntimeError, match="was put there after apply_fpdt"):
            train_step(wrapped(late), IDS)
    else:
        assert_same_step(train_step(wrapped(late), IDS), truth)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MIXERS, "none"])
def test_on_a_gpu_in_bfloat16_mixers_are_refused_and_nothing_else(name: str) -> None:
    model = tiny(dtype=torch.float64)
    if name != "none":
        MIXERS[name][0](model)
    model.to("cuda", torch.bfloat16)
    if name == "what was last time":
        model.model.layers[1].mlp.act_fn.last = torch.zeros((), device="cuda", dtype=torch.bfloat16)
    if name == "none":
        apply_fpdt(model, PLUGIN)
    else:
        with pytest.raises(NotImplementedError, match="layer 1 .* cannot be run in chunks"):
            apply_fpdt(model, PLUGIN)
