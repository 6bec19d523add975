"""Recurrent layers in narrow numbers, and those whose states are not all that a chunk needs."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import hf_fpdt.engine.trial_run
from hf_fpdt import apply_fpdt
from hf_fpdt.engine.recurrent import StandInCache, kernels_of
from hf_fpdt.engine.trial import why_not_kernels
from hf_fpdt.engine.trial_run import LayerTrial
from tests.helpers.kinds import in_double
from tests.helpers.models import PLUGIN, Step, taken_step, tiny, tokens, train_step
from tests.helpers.recurrent import CutOff, Forgets, Shifted, recurrent

IDS = tokens(2, 37)


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "kimi_linear"])
@pytest.mark.parametrize("dtype", ["autocast", "bfloat16", "float32"])
def test_narrow_numbers_are_as_accurate_as_the_plain_model(name: str, dtype: str) -> None:
    model = recurrent(name).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    with in_double():
        truth = train_step(copy.deepcopy(model).double(), IDS)

    def step(model: Any) -> Step:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return taken_step(model, loss)

    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    naive, results = step(copy.deepcopy(model)), step(applied)
    assert results.grads.keys() == truth.grads.keys()
    for key, grad in truth.grads.items():
        our, their = (float((s.grads[key].double() - grad).norm()) for s in (results, naive))
        assert our <= 2 * their + 1e-3 * float(grad.norm()), f"{key}: {our:.2e}, not {their:.2e}"


@pytest.mark.parametrize("bug", [Forgets, CutOff, Shifted])
@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "lfm2"])
def test_a_layer_that_does_not_go_on_from_its_states_is_refused(
    bug: type[StandInCache], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_fpdt.engine.trial_run, "StandInCache", bug)
    with pytest.raises(NotImplementedError, match="layer 0 .* is not all that it needs of the tokens before"):
        apply_fpdt(recurrent(name).float(), PLUGIN)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mamba", {"state_size": 4}),
        ("falcon_mamba", {"state_size": 4}),
        ("jamba", {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    ],
)
def test_recurrences_that_take_no_state_are_refused_by_name(name: str, config: dict[str, Any]) -> None:
    """Mamba-1's scan begins with zeros whatever it is given; lightning attention keeps its own cache."""
    with pytest.raises(NotImplementedError, match=r"layer 0 .*(Mamba-1|leaves no state in a cache)"):
        apply_fpdt(tiny(name, attention="eager", dtype=torch.float32, **config), PLUGIN)


# -- kernels ----------------------------------------------------------------------------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]) -> None:
    """A package whose kernel transformers chooses for the gated delta rule of Qwen3.5."""
    package: Any = types.ModuleType("planted_kernels")
    package.ops = types.SimpleNamespace(gated_delta_rule=types.SimpleNamespace(chunk_gated_delta_rule=kernel))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    choose = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", package.__name__)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", choose(PLAIN))


PLAIN: Any = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)


@wraps(PLAIN)
def kernel(*arguments: Any, **options: Any) -> Any:
    """One that is right; transformers hands over what its signature names."""
    return PLAIN(*arguments, **options)


@wraps(PLAIN)
def without_gradient_of_g(*arguments: Any, g: Tensor, **options: Any) -> Any:
    """What Triton made of it on Hopper for some releases, in silence."""
    return PLAIN(*arguments, g=g.detach(), **options)


@wraps(PLAIN)
def refusing(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("Triton < 3.7.1 on Hopper GPUs produces incorrect results")


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        (kernel, None),
        (without_gradient_of_g, r"gradient of its input|A_log|dt_bias"),
        (refusing, r"fails on this machine \(Triton < 3.7.1"),
    ],
)
def test_a_kernel_with_other_gradients_than_pytorchs_is_refused(
    planted: Callable[..., Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, planted)
    model: Any = recurrent("qwen3_5_text").float()
    layer = model.model.layers[0]
    assert "torch_chunk_gated_delta_rule" in kernels_of(layer) and not kernels_of(model.model.layers[1])
    like = torch.zeros(1, 288, 32)
    found = why_not_kernels(LayerTrial(layer, layer.forward, {"position_embeddings": None}, like, 288))
    assert (found is None) == (reason is None), found
    if found is not None and reason is not None:
        assert re.search(reason, found) and "Triton 3.7.1 or newer" in found
