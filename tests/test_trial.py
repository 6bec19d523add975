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
from transformers import PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.trial import LayerTrials
from tests.models import PLUGIN, assert_same_step, tiny, tokens, train_step

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
    return y + 0.1 * torch.arange(y.shape[1], dtype=y.dtype).sin()[:, None]


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
    assert_same_step(*steps, tolerance=0.0)


def test_layers_of_one_kind_are_tried_once_and_steps_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    check = LayerTrials.check
    monkeypatch.setattr(LayerTrials, "check", lambda self, *args: tried.append(args[0]) or check(self, *args))
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
