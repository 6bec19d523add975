"""Layers whose linears are shared, replaced or called oddly: what is kept of them is what a backward pass computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tests.engine.test_layer import assert_equal
from tests.helpers.offloaded import applied, sequences, step
from tests.helpers.truth import in_double, tiny, truth


def decoder(layers: int = 2) -> tuple[PreTrainedModel, Any]:
    model: Any = in_double(tiny("llama", num_hidden_layers=layers, num_key_value_heads=4))
    return model, model.model.layers


def swapped() -> PreTrainedModel:
    """The gate of one layer is the other projection of the next, and the other way round."""
    model, (lower, upper) = decoder()
    upper.mlp.gate_proj, upper.mlp.up_proj = lower.mlp.up_proj, lower.mlp.gate_proj
    return model


def keys_are_queries() -> PreTrainedModel:
    """What makes keys in one layer makes queries in the next, whose values not every pass reads."""
    model, (lower, upper) = decoder()
    upper.self_attn.q_proj = lower.self_attn.k_proj
    return model


def replaced(name: str) -> PreTrainedModel:
    """A forward of an instance's own, as accelerate's hooks put it there, that gives twice the product."""
    model, layers = decoder()
    for layer in layers:
        linear = layer.get_submodule(name)
        linear.forward = MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), linear)
    return model


class Recomputed(nn.Module):
    """An MLP that checkpoints itself."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.mlp, x, use_reentrant=False)


class Twice(nn.Module):
    """A linear that is called once for a few tokens, as in a trial, and twice for more."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x * 2) / 2 if x.shape[1] > 48 else None
        return self.linear(x) if y is None else (y + self.linear(x)) / 2


def recomputed() -> PreTrainedModel:
    model, layers = decoder()
    for layer in layers:
        layer.mlp = Recomputed(layer.mlp)
    return model


def called_twice() -> PreTrainedModel:
    model, layers = decoder()
    for layer in layers:
        layer.self_attn.k_proj = Twice(layer.self_attn.k_proj)
    return model


ODD: dict[str, Callable[[], PreTrainedModel]] = {
    "swapped": swapped,
    "keys are queries": keys_are_queries,
    "queries replaced": partial(replaced, "self_attn.q_proj"),
    "keys replaced": partial(replaced, "self_attn.k_proj"),
    "last product replaced": partial(replaced, "mlp.down_proj"),
    "recomputed": recomputed,
    "called twice": called_twice,
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_layer_has_the_gradients_of_the_plain_model(case: str) -> None:
    """In the first step, and in a second, for which everything is known."""
    model, data = ODD[case](), sequences()
    exact = truth(model, data["input_ids"], data["labels"])
    for settings in (
        {"checkpoints": "linears"},
        {"checkpoints": "linears", "device_budget_gib": 0, "fused": False},
        {"checkpoints": "attention"},
    ):
        ours, handle = applied(model, chunk_tokens=64, **settings)
        for _ in range(2):
            assert_equal(step(ours, data), exact, 1e-10)
        handle.remove()
