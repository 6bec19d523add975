"""Values that no gradient is made of are found by asking the layer; what is read in any way is not among them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.unread import ValuesSeen, unread_values
from hf_fpdt.model.layers import decoder_layers
from tests.helpers import recurrent
from tests.helpers.models import tiny, tokens

# Of the first layer; a norm that comes last, in OLMo 3, is read by nobody, and what is before it is.
UNREAD = {
    "llama": "mlp mlp.down_proj",
    "gpt_neox": "mlp mlp.dense_4h_to_h post_mlp_dropout attention.dense post_attention_dropout",
    "phi3": "mlp mlp.down_proj resid_mlp_dropout",
    "granite": "mlp mlp.down_proj",
    "cohere2": "mlp mlp.down_proj self_attn.o_proj",
    "starcoder2": "mlp mlp.c_proj",
    "olmo3": "post_feedforward_layernorm",
    "qwen3_5_text": "mlp mlp.down_proj",
    "kimi_linear": "mlp mlp.down_proj",
    "bamba": "feed_forward feed_forward.down_proj",
    "falcon_h1": "feed_forward feed_forward.down_proj",
    "lfm2": "feed_forward feed_forward.w2",
}
EXPERTS = {
    "mixtral": "mlp mlp.experts",
    "gpt_oss": "mlp.experts",
    "granitemoehybrid": "block_sparse_moe block_sparse_moe.experts shared_mlp shared_mlp.output_linear",
}


def model_of(name: str, **more: Any) -> Any:
    return tiny(name, attention="eager", dtype=torch.float32, **recurrent.FAMILIES.get(name, {}), **more)


def found(model: Any) -> list[set[str]]:
    layers: list[Any] = decoder_layers(model)
    return [set(layer._fpdt_traits.unread) for layer in layers]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", UNREAD)
def test_a_layer_is_asked_whose_values_nobody_reads(name: str, device: str) -> None:
    model = model_of(name).to(device)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    assert found(model)[0] == set(UNREAD[name].split())


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_asked_too(name: str) -> None:
    model = model_of(name)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    assert found(model)[0] == set(EXPERTS[name].split())


def test_adapters_are_asked_as_a_whole() -> None:
    """DoRA's own code reads what its base gave, and nobody what it gives itself."""
    for dora in (False, True):
        config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
        model: Any = get_peft_model(model_of("llama"), config)
        apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
        assert found(model.get_base_model())[0] == {"mlp", "mlp.down_proj"}


class Scaled(LlamaDecoderLayer):
    """Llama's layer with a scale on what its MLP gives; the scale's gradient is made of that value."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        y = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return y + self.scale * self.mlp(self.post_attention_layernorm(y))


def test_what_is_unfrozen_later_gets_the_value_that_it_needs() -> None:
    model, ids = model_of("llama"), tokens(1, 40)
    for layer in model.model.layers:
        layer.scale = nn.Parameter(torch.linspace(0.5, 1.5, model.config.hidden_size), requires_grad=False)
        layer.__class__ = Scaled
    plain = copy.deepcopy(model)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert found(model) == [{"mlp", "mlp.down_proj"}] * 2
    for each in (model, plain):
        each.zero_grad()
        for layer in each.model.layers:
            layer.scale.requires_grad_()
        each(input_ids=ids, labels=ids).loss.backward()
    for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-6)
    assert found(model) == [set(), set()]


class Reader(nn.Module):
    """Adds to its input what a linear gives, after a function of it."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(8, 8), then

    def forward(self, x: Tensor) -> Tensor:
        return x + self.then(self.linear(x))


NOT_READ: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda y: y,
    "scaled": lambda y: 0.5 * y,
    "another dtype": lambda y: y.double().float(),
    "a half": lambda y: torch.cat([y[..., :4], -y[..., 4:]], -1),
}


def finite(y: Tensor) -> Tensor:
    if not bool(y.isfinite().all()):
        raise ValueError("no number")
    return y


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "a check": finite,
    "an activation": torch.sigmoid,
    "a mask": lambda y: torch.relu(y),
    "a comparison": lambda y: torch.where(y.detach() > 0.3, 2 * y, y),
    "where it overflows": lambda y: y.clamp(-9, 9) if y.isinf().any() else y,
    "a choice": lambda y: y * (torch.arange(8, device=y.device) == y.argmax(-1, keepdim=True)),
    "a detached factor": lambda y: y * y.detach(),
}


@pytest.mark.parametrize("then", [*NOT_READ, *READ])
def test_every_way_to_read_a_value_is_seen(then: str) -> None:
    torch.manual_seed(0)
    layer, x = Reader((NOT_READ | READ)[then]), torch.randn(1, 6, 8)

    def outcome() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return list(torch.autograd.grad(layer(leaf).sum(), [leaf, *layer.parameters()]))

    expected = {"linear"} if then in NOT_READ else set()
    assert unread_values(layer, ["linear"], outcome, 1e-6) == expected
    if then not in ("a check", "where it overflows"):  # which ask for values
        layer, x = layer.to("meta"), x.to("meta").requires_grad_()
        values = ValuesSeen(layer, x, lambda: False)
        with values.saved():
            layer(x)
        assert values.never_saved(attends=False) == expected


def test_one_that_is_read_does_not_hide_the_others() -> None:
    """As a kernel outside of PyTorch reads, of which it cannot be seen what it saves."""
    torch.manual_seed(0)
    layer, x = nn.ModuleList([Reader(NOT_READ["scaled"]), Reader(torch.sigmoid)]), torch.randn(1, 6, 8)

    def outcome() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return list(torch.autograd.grad(layer[1](layer[0](leaf)).sum(), [leaf, *layer.parameters()]))

    # What comes first goes into the sigmoid too.
    assert unread_values(layer, ["0.linear", "1.linear", "1"], outcome, 1e-6) == {"1"}


@pytest.mark.parametrize(("name", "unread"), [("mlp.down_proj", {"mlp"}), ("mlp", set()), ("mlp.gate_proj", None)])
def test_a_value_that_a_hook_reads_is_made(name: str, unread: set[str] | None) -> None:
    """No hook of a user sees other numbers, in a trial or a replay."""
    model, ids, seen = model_of("llama"), tokens(1, 40), list[Tensor]()
    for layer in model.model.layers:
        layer.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16, checkpoints="attention"))
    model(input_ids=ids, labels=ids).loss.backward()
    assert found(model) == [{"mlp", "mlp.down_proj"} if unread is None else unread] * 2
    assert seen and all(bool(value.isfinite().all()) for value in seen)
