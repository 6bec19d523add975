"""How often linears are really multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

import hf_fpdt.model.fused_linear
import hf_fpdt.model.weights.quantised

WHERE = (nn.functional, hf_fpdt.model.fused_linear, hf_fpdt.model.weights.quantised)


def rows_through(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, int]:
    """How many tokens the modules' weights are multiplied with in a run, by their names.

    Of quantised ones it is the weight that they have at the time.
    """
    original, rows = nn.functional.linear, dict.fromkeys(modules, 0)

    def counted(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        for name, module in modules.items():
            rows[name] += x.shape[:-1].numel() if module._parameters["weight"] is weight else 0
        return original(x, weight, *bias)

    with pytest.MonkeyPatch.context() as patch:
        for where in WHERE:
            patch.setattr(where, "linear", counted)
        run()
    return rows


def rows_multiplied(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """How many tokens are multiplied with each weight of layers' linears in a run, adapters aside."""
    modules = {
        name.removesuffix(".base_layer").partition("layers.")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name and "lora_" not in name
    }
    return rows_through(modules, run)
