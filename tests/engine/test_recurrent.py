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
from torch import Tensor, nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import hf_fpdt.engine.trial_run
from hf_fpdt import apply_fpdt
from hf_fpdt.engine.recurrent import StandInCache, cache_argument, kernels_of
from hf_fpdt.engine.trial import repeats_of, why_not_kernels
from hf_fpdt.engine.trial_run import LayerTrial
from tests.helpers.kinds import TOLERANCE, in_double
from tests.helpers.models import PLUGIN, Step, assert_same_step, taken_step, tiny, tokens, train_step
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


class OfSizeOne(torch.autograd.Function):
    """A gradient in whatever draw is divided by its norm."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm()


class Unsummed(nn.Module):
    """An MLP with one."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.weight = mlp, nn.Parameter(torch.ones(32))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.mlp(x_BSD) * OfSizeOne.apply(self.weight)


def test_a_gradient_that_cancels_in_one_draw_is_no_reason() -> None:
    """Of a decay's the sum over tokens may be nearly zero, and rounding is left: such weights are one in fifty."""
    model: Any = recurrent("qwen3_5_text", linear_num_key_heads=1, linear_num_value_heads=1).float()
    layer = model.model.layers[0]
    for seed in (66, 92, 98):
        torch.manual_seed(seed)
        for module in layer.modules():
            model._init_weights(module)
        trial = LayerTrial(layer, layer.forward, {"position_embeddings": None}, torch.zeros(1, 48, 32), 48)
        assert trial.why_not(cache_argument(layer.forward)) is None
    layer.mlp = Unsummed(layer.mlp)
    trial = LayerTrial(layer, layer.forward, {"position_embeddings": None}, torch.zeros(1, 48, 32), 48)
    assert trial.why_not(cache_argument(layer.forward)) == "the gradient of mlp.weight is no sum over tokens"


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_first_step_of_few_tokens_tries_layers_and_is_exact(length: int) -> None:
    """No chunk of a trial has one token, which goes another way than several: states written in place."""
    with in_double():
        model, ids = recurrent("bamba"), tokens(2, length)
        applied = copy.deepcopy(model)
        apply_fpdt(applied, PLUGIN)
        applied.model.layers[0].eval()  # looks otherwise than it did when it was tried
        assert_same_step(train_step(applied, ids), train_step(model, ids), TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba"])
def test_no_mark_of_packed_documents_reaches_a_layer(name: str) -> None:
    """Kernels take these marks, and would be given those of the whole row with each chunk: they get pieces instead."""
    with in_double():
        model = recurrent(name)
        apply_fpdt(model, PLUGIN)
        restarts = torch.cat([torch.arange(20), torch.arange(17)])[None]
        expected = train_step(model, IDS[:1], position_ids=restarts)
        marks = {"seq_idx": torch.arange(37).ge(20).int()[None], "cu_seq_lens_q": torch.tensor([0, 20, 37]).int()}
        for mark, value in marks.items():
            assert_same_step(train_step(model, IDS[:1], **{mark: value}), expected, TOLERANCE)


ZAMBA2: dict[str, Any] = {
    "mamba_ngroups": 2, "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 16, "num_hidden_layers": 2,
    "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 4,
}  # fmt: skip


def test_layers_that_embeddings_reach_beside_hidden_states_are_refused_where_those_train() -> None:
    """Zamba2's: exact where its embeddings are frozen, and otherwise refused when FPDT is applied."""
    with in_double():
        model: Any = tiny("zamba2", attention="eager", **ZAMBA2)
        with pytest.raises(NotImplementedError, match="'original_hidden_states' .* carry a gradient into a layer"):
            apply_fpdt(copy.deepcopy(model), PLUGIN)
        model.get_input_embeddings().requires_grad_(False)
        applied = copy.deepcopy(model)
        apply_fpdt(applied, PLUGIN)
        assert_same_step(train_step(applied, IDS), train_step(model, IDS), TOLERANCE)


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


@wraps(PLAIN)
def without_a_part(*arguments: Any, **options: Any) -> Any:
    """Mamba-ssm where causal-conv1d is not installed."""
    part: Any = None
    return part(*arguments, **options)


@pytest.mark.parametrize("over_kernels", [False, True])
def test_a_trial_has_a_border_between_chunks_however_few_tokens_a_step_has(over_kernels: bool) -> None:
    """One chunk of all of them would say nothing of states."""
    layer: Any = torch.nn.Linear(4, 4)
    for n_given in range(2, 49):
        n_tokens = n_given * repeats_of(n_given, over_kernels=over_kernels)
        chunks = LayerTrial(layer, layer.forward, {}, torch.zeros(1, n_given, 4), n_tokens).plan.chunks
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert len(chunks) > 1 and min(sizes) > 1, f"{n_given} tokens: {sizes}"
        assert not over_kernels or (sizes[0] == 256 and min(sizes) >= 64), "blocks of the kernels"


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        (kernel, None),
        (without_gradient_of_g, r"gradient of its input|A_log|dt_bias"),
        (refusing, r"fails on this machine \(Triton < 3.7.1"),
        (without_a_part, r"fails on this machine \('NoneType' object is not callable\).*mamba-ssm with causal-conv1d"),
    ],
)
def test_a_kernel_with_other_gradients_than_pytorchs_is_refused(
    planted: Callable[..., Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    installed(monkeypatch, planted)
    model: Any = recurrent("qwen3_5_text").float()
    layer = model.model.layers[0]
    assert "torch_chunk_gated_delta_rule" in kernels_of(layer) and not kernels_of(model.model.layers[1])
    like = torch.zeros(1, 288, 32)
    found = why_not_kernels(LayerTrial(layer, layer.forward, {"position_embeddings": None}, like, 288))
    assert (found is None) == (reason is None), found
    assert "compiles and tunes kernels" in caplog.text, "or minutes pass in silence"
    if found is not None and reason is not None:
        assert re.search(reason, found) and "Triton 3.7.1 or newer" in found


def test_a_model_without_memory_is_asked_by_pytorchs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read from nowhere: on a GPU an illegal access, and `hf-fpdt plan` may run where one is."""
    traits: dict[bool, Any] = {}
    for bare in (False, True):
        with torch.device("meta" if bare else "cpu"):
            model: Any = recurrent("qwen3_5_text").float()
        installed(monkeypatch, kernel if not bare else refusing)
        apply_fpdt(model, PLUGIN)
        traits[bare] = model.model.layers[0]._fpdt_traits
    assert traits[True].states and traits[True].states == traits[False].states
