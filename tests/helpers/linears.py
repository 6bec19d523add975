"""How often linears are really multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

import hf_fpdt.model.fused_linear


def rows_through(names: Mapping[int, str], run: Callable[[], object]) -> dict[str, int]:
    """How many tokens weights are multiplied with in a run, by the names that are given to their ids."""
    original, rows = nn.functional.linear, dict[str, int](dict.fromkeys(names.values(), 0))

    def counted(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        if id(weight) in names:
            rows[names[id(weight)]] += x.shape[:-1].numel()
        return original(x, weight, *bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counted)
        patch.setattr(hf_fpdt.model.fused_linear, "linear", counted)
        run()
    return rows
