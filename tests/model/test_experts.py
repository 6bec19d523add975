"""Chosen experts as one operation: loss and every gradient, whatever the gate, biases and what trains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine import current_call
from hf_fpdt.model.experts import passes
from hf_fpdt.model.experts.gates import OwnGate, gate_of
from hf_fpdt.model.experts.operation import Weights, run_experts
from hf_fpdt.model.experts.passes import Gate
from hf_fpdt.model.experts.replace import are_experts, why_not_replaced
from hf_fpdt.model.experts.routes import Routes
from hf_fpdt.model.fused_linear import OutputUse
from hf_fpdt.model.patch import is_patched
from hf_fpdt.model.shapes import training_of
from tests.helpers.kinds import TOLERANCE, in_double, kind, with_adapters
from tests.helpers.models import CHUNK, PLUGIN, Step, assert_same_step, tiny, tokens, train_step
from tests.helpers.support import assert_as_accurate, assert_rejects, relative_error

EXPERTS, VISITED, TOKENS, INF = 4, 2, 23, float("inf")
ROUTED = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
FEW = {"num_experts_per_tok": VISITED, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {**FEW, "num_local_experts": EXPERTS},
    "qwen3_moe": {**FEW, "num_experts": EXPERTS, "decoder_sparse_step": 1},
    "mixtral": {**FEW, "num_local_experts": EXPERTS},
    "deepseek_v3": {**FEW, **ROUTED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4, "n_shared_experts": 1},
    "gemma4_text": {**FEW, "num_experts": EXPERTS, "top_k_experts": VISITED, "enable_moe_block": True}
    | {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2, "global_head_dim": 8},
}
SILU = Gate(alpha=1.0, shift=0.0, gate_max=INF, up_min=-INF, up_max=INF, interleaved=False)
GATES = {
    "gpt_oss": Gate(alpha=1.702, shift=1.0, gate_max=7.0, up_min=-7.0, up_max=7.0, interleaved=True),
    "qwen3_moe": SILU,
    "mixtral": SILU,
    "deepseek_v3": SILU,
}


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if are_experts(module)]


def module_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A module of experts whose rows reach every limit of its gate, the last expert the one that no token chooses."""
    module = copy.deepcopy(experts_of(tiny(name, attention="eager", **FAMILIES[name]))[0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.8, generator=generator)
    module.config._experts_implementation = "eager"
    return module.to(dtype)


def inputs_of(module: Any, visited: int = VISITED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts, their weights, and a gradient."""
    generator = torch.Generator().manual_seed(4)
    dtype, width = module.down_proj.dtype, 32
    x, dy = (torch.randn(TOKENS, width, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.stack([torch.randperm(EXPERTS - 1, generator=generator) for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, visited, generator=generator, dtype=torch.float64)
    return x.to(dtype), order[:, :visited], weights.to(dtype), dy.to(dtype)


Run = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def own(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    result: Tensor = module(x, chosen, weights)
    return result


def ours(
    module: Any, x: Tensor, chosen: Tensor, weights: Tensor, gate: Any = None, unread: bool = False, shift: int = 0
) -> Tensor:
    """With broken variants: another gate, or biases of the neighbouring expert."""
    first, second = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        first, second = first.transpose(-2, -1), second.transpose(-2, -1)
    names = ("gate_up_proj_bias", "down_proj_bias") if module.has_bias else ()
    biases = (getattr(module, name).roll(shift, 0) for name in names)
    routes = Routes.of(chosen, module.num_experts)
    return run_experts(x, weights, routes, Weights(first, second, *biases), gate or gate_of(module), unread)


def results(run: Run, module: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    x, chosen, weights, dy = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(module, x, chosen, weights)
    wanted = {"dx": x, "d_weights": weights} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad([y], list(wanted.values()), [dy]), strict=True))


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-13) -> None:
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        assert relative_error(found[name], exact) <= tolerance, name


# -- the operation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visited", [1, 2])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_every_gradient_are_those_of_the_models_own_loop(name: str, trained: bool, visited: int) -> None:
    """In float64; one expert gets no token."""
    module = module_of(name).requires_grad_(trained)
    inputs = inputs_of(module, visited)
    truth = results(own, module, inputs)
    assert len(truth) == 3 + trained * len(list(module.parameters()))
    assert_equal(results(ours, module, inputs), truth)
    x, chosen, weights, dy = inputs
    unlimited = replace(GATES.get(name, SILU), gate_max=INF, up_min=-INF, up_max=INF)

    broken = {
        "no routing weights": results(ours, module, (x, chosen, torch.ones_like(weights), dy)),
        "the next expert": results(ours, module, (x, (chosen + 1) % EXPERTS, weights, dy)),
    }
    if module.has_bias:
        broken |= {"the neighbour's bias": results(partial(ours, shift=1), module, inputs)}
    if name not in GATES or GATES[name] != SILU:
        broken |= {"no limits": results(partial(ours, gate=unlimited), module, inputs)}
    assert_rejects(lambda found: assert_equal(found, truth), broken)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_a_value_that_nobody_reads_has_the_same_gradients(name: str) -> None:
    module = module_of(name)
    truth = results(own, module, inputs_of(module))
    found = results(partial(ours, unread=True), module, inputs_of(module))
    value = found.pop("y")
    assert value.shape == truth.pop("y").shape
    assert_equal(found, truth)


def test_rows_of_no_expert_count_for_nothing() -> None:
    """Ranks that share experts give such tokens the number after the last."""
    module = module_of("gpt_oss")
    x, chosen, weights, dy = inputs_of(module)
    elsewhere = chosen.clone()
    elsewhere[3, 1] = EXPERTS
    none = weights.clone()
    none[3, 1] = 0
    truth = results(own, module, (x, chosen, none, dy))
    truth["d_weights"][3, 1] = 0
    found = results(ours, module, (x, elsewhere, weights, dy))
    assert_equal(found, truth)


def test_products_are_in_the_dtype_of_the_weights() -> None:
    """Hidden states in fp32, as a norm gives them under autocast: as accurate as transformers' own."""
    module = module_of("gpt_oss", torch.bfloat16)
    x, chosen, weights, dy = (each if each.dtype == torch.int64 else each.float() for each in inputs_of(module))
    found = results(ours, module, (x, chosen, weights, dy))
    wide = copy.deepcopy(module).double()
    truth = results(own, wide, (x.double(), chosen, weights.double(), dy.double()))
    module.config = copy.copy(module.config)
    module.config._experts_implementation = "grouped_mm"
    naive = results(own, module, (x, chosen, weights, dy))
    assert found["y"].dtype == found["dx"].dtype == torch.float32
    for name, exact in truth.items():
        assert_as_accurate(found[name], naive[name].to(found[name].dtype), exact, name=name)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_known_by_what_it_computes(name: str) -> None:
    assert gate_of(module_of(name)) == GATES[name]


class Gated(nn.Module):
    """What `gate_of` asks of a module."""

    has_gate = True

    def __init__(self, gate: Callable[[Tensor], Tensor], is_concatenated: bool = True) -> None:
        super().__init__()
        self.down_proj, self._apply_gate, self.is_concatenated = nn.Parameter(torch.zeros(1)), gate, is_concatenated


def silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return nn.functional.silu(gate) * up


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda rows: nn.functional.gelu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1],
    "in turns": lambda rows: nn.functional.silu(rows[..., ::2]) * rows[..., 1::2],
    "a lower limit of the gate": lambda rows: silu(rows.clamp(min=-5)),
    "a little more": lambda rows: silu(rows) * (1 + 1e-9),
    "in fp32": lambda rows: silu(rows.float()).to(rows.dtype),
    "up alone": lambda rows: rows.chunk(2, -1)[1],
    "a step": lambda rows: silu(rows) + (rows.chunk(2, -1)[0] > 50),
    "fails in float64": lambda rows: silu(rows) if rows.dtype != torch.float64 else rows.view(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_gate_of_another_kind_stays_the_modules_own(name: str) -> None:
    module = Gated(OTHERS[name])
    found = gate_of(module)
    assert isinstance(found, OwnGate) and found.function is module._apply_gate


def test_a_gate_that_may_read_a_buffer_stays_the_modules_own() -> None:
    module = Gated(silu)
    assert gate_of(module) == SILU
    module.register_buffer("limit", torch.tensor(7.0))
    assert isinstance(gate_of(module), OwnGate)


@pytest.mark.parametrize("limits", [(0.5, -0.25, 2.0), (7.0, -7.0, 7.0), (1e-3, -INF, INF), (INF, -3.0, 1.0)])
def test_limits_are_found_wherever_they_are(limits: tuple[float, float, float]) -> None:
    expected = Gate(0.7, 0.3, *limits, interleaved=True)
    routes = Routes.of(torch.zeros(1, 1, dtype=torch.int64), 1)
    found = gate_of(Gated(lambda rows: expected.forward(rows, None, routes), is_concatenated=False))
    # A limit of the gate below the first point tried is none that is looked for.
    assert found == expected or (isinstance(found, OwnGate) and limits[0] < 1)


def test_a_number_that_changes_is_asked_for_again() -> None:
    ids = tokens(1, 19)
    model: Any = tiny("gpt_oss", attention="eager", dtype=torch.float32, **FAMILIES["gpt_oss"])
    other = copy.deepcopy(model)
    apply_fpdt(model, PLUGIN)
    before = train_step(model, ids)
    for module in (*experts_of(model), *experts_of(other)):
        module.limit = 0.1
    after = train_step(model, ids)
    truth = train_step(other, ids)
    assert_same_step(after, truth, 2e-5)
    assert_rejects(lambda step: assert_same_step(step, truth, 2e-5), {"the limit of before": before})


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def step_of(model: PreTrainedModel | nn.Module, ids: Tensor, plugin: FPDTPlugin = PLUGIN) -> Step:
    """Ours: layers are tried with the model's own loop, as they have no other float64."""
    model = copy.deepcopy(model)
    handle = apply_fpdt(model, plugin)
    handle.model.set_experts_implementation("grouped_mm")
    step = train_step(model, ids)
    assert experts_of(model) and all(map(is_patched, experts_of(model)))
    return step


@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "deepseek_v3", "qwen2_moe"])
@pytest.mark.usefixtures("float64_throughout")
def test_a_step_is_exact_whatever_is_kept(name: str, checkpoints: str) -> None:
    """Every weight trains."""
    ids = tokens(2, 37)
    model = kind(name)
    truth = train_step(model, ids)
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints)
    assert_same_step(step_of(model, ids, plugin), truth, TOLERANCE)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "deepseek_v3"])
@pytest.mark.usefixtures("float64_throughout")
def test_adapters_on_experts_are_exact(name: str) -> None:
    """PEFT makes an expert's weights anew in each forward, with a graph."""
    ids = tokens(2, 37)
    model = with_adapters(kind(name))
    truth = train_step(model, ids)
    assert any("experts" in grad for grad in truth.grads)
    assert_same_step(step_of(model, ids), truth, TOLERANCE)


def test_a_value_that_a_hook_reads_is_computed_in_a_replay() -> None:
    """Its square, of which the gradient needs the value."""
    ids = tokens(1, 23)
    model: Any = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"])
    for module in experts_of(model):
        module.register_forward_hook(lambda module, args, output: output * output)
    truth = train_step(copy.deepcopy(model), ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth, 2e-5)
    assert all(map(is_patched, experts_of(model)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputUse, "unread", property(lambda use: current_call() is not None))
        broken = train_step(model, ids)
    assert_rejects(lambda step: assert_same_step(step, truth, 2e-5), {"never computed": broken})


def test_under_autocast_a_step_is_as_accurate_as_the_models_own() -> None:
    ids = tokens(2, 37)
    model: Any = tiny("gpt_oss", attention="eager", dtype=torch.float32, **FAMILIES["gpt_oss"])
    exact: Any = copy.deepcopy(model)
    exact.set_experts_implementation("eager")
    truth = train_step(exact.double(), ids)

    def taken(fused: bool) -> Step:
        copied = copy.deepcopy(model)
        apply_fpdt(copied, FPDTPlugin(chunk_tokens=CHUNK, fused=fused))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train_step(copied, ids)

    found, naive = taken(True), taken(False)
    for name, exact_grad in truth.grads.items():
        errors = [(step.grads[name].double() - exact_grad.double()).norm() for step in (found, naive)]
        assert errors[0] <= 2 * errors[1] + 2**-8 * exact_grad.norm(), name


# -- which are replaced -----------------------------------------------------------------------------------------------


def test_experts_are_left_as_they_are_where_that_is_asked_for() -> None:
    ids = tokens(1, 19)
    for plugin, implementation in ((PLUGIN, "eager"), (FPDTPlugin(chunk_tokens=CHUNK, fused=False), "grouped_mm")):
        model: Any = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"])
        model.set_experts_implementation(implementation)
        apply_fpdt(model, plugin)
        train_step(model, ids)
        assert not any(map(is_patched, experts_of(model)))


def test_a_patched_module_runs_as_asked_for_later() -> None:
    ids = tokens(1, 19)
    model: Any = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"])
    truth = train_step(model, ids)
    handle = apply_fpdt(model, PLUGIN)
    train_step(model, ids)
    model.set_experts_implementation("eager")
    assert_same_step(train_step(model, ids), truth, 2e-5)
    handle.remove()
    assert not any(map(is_patched, experts_of(model)))


def test_experts_of_another_kind_run_as_the_model_has_them(caplog: pytest.LogCaptureFixture) -> None:
    """With something that the operation knows nothing of, which is said once."""
    ids = tokens(1, 19)
    model: Any = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"])
    for module in experts_of(model):
        module.scale = nn.Parameter(torch.ones(()))
        assert "scale" in str(why_not_replaced(module))
    truth = train_step(copy.deepcopy(model), ids)
    apply_fpdt(model, PLUGIN)
    with caplog.at_level(logging.WARNING, "hf_fpdt"):
        assert_same_step(train_step(model, ids), truth, 2e-5)
        train_step(model, ids)
    assert not any(map(is_patched, experts_of(model)))
    assert caplog.text.count("run as the model has them, slower") == 1


def test_what_is_no_plain_sum_of_experts_is_not_replaced() -> None:
    module = module_of("qwen3_moe")
    assert why_not_replaced(module) is None
    normed, narrow, forwarded = (copy.deepcopy(module) for _ in range(3))
    normed.has_post_expert_norm = True
    narrow.down_proj = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    forwarded.forward = lambda *args: args[0]
    assert [bool(why_not_replaced(each)) for each in (normed, narrow, forwarded)] == [True] * 3


def test_what_is_planned_is_what_runs() -> None:
    """The memory of a chunk's experts, and what is said when FPDT is applied."""
    kinds: dict[str, dict[str, Any]] = {
        "replaced": {},
        "asked for otherwise": {"implementation": "eager"},
        "not fused": {"fused": False},
    }
    found = {}
    for name, changes in kinds.items():
        model: Any = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"])
        model.set_experts_implementation(changes.get("implementation", "grouped_mm"))
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, fused=changes.get("fused", True)))
        train_step(model, tokens(1, 19))
        (step,) = {each for each, _ in handle.store.plans}
        rows = step.device_rows(step.kv_bytes(0))
        replayed = max(row.nbytes for row in rows if row.kind == "activations")
        found[name] = (step.fused_experts, "experts as one operation" in str(handle), replayed)
        assert step.fused_experts == all(map(is_patched, experts_of(model)))
    assert [each[:2] for each in found.values()] == [(True, True), (False, False), (False, False)]
    assert found["replaced"][2] < found["not fused"][2]
    # A plan from the configuration alone, and one of a model without experts.
    config = tiny("qwen3_moe", dtype=torch.float32, **FAMILIES["qwen3_moe"]).config
    assert training_of(config, lora=True).fused_experts
    assert not training_of(tiny().config, lora=True).fused_experts


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [GATES["gpt_oss"], SILU], ids=["gpt_oss", "silu"])
def test_gpu_kernels_are_as_accurate_as_what_they_stand_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, beside PyTorch in bfloat16; widths that no block divides."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 4 * torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float64)

    count, hidden, width, experts = 301, 1096, 1032, 5
    chosen = torch.rand(count, experts - 1, device="cuda", generator=generator).argsort(-1)[:, :3]
    routes = Routes.of(chosen, experts)
    biases = normal(experts, 2 * width), normal(experts, hidden)
    weights = normal(count, 3).softmax(-1)
    tensors = normal(count, hidden), normal(3 * count, 2 * width), normal(3 * count, width), normal(3 * count, hidden)

    def everything(dtype: torch.dtype, kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(passes, "_has_kernels", lambda tensor: kernels)
        x, gate_up, d_hidden, rows, bias, out_bias, shares = (t.to(dtype) for t in (*tensors, *biases, weights))
        shares_S = shares.flatten()[routes.order_S]
        found = [*passes.gather_rows(x, routes, dtype, out_bias), gate.forward(gate_up, bias, routes)]
        found += [gate.forward(gate_up, None, routes, shares_S)]
        found += gate.backward(gate_up, bias, routes, d_hidden, shares_S)
        found += [passes.sum_rows(rows, routes, dtype, shares, out_bias), passes.sum_rows(rows, routes, dtype)]
        return found

    truth = everything(torch.float64, False)
    naive, found = everything(torch.bfloat16, False), everything(torch.bfloat16, True)
    for index, (one, other, exact) in enumerate(zip(found, naive, truth, strict=True)):
        assert_as_accurate(one, other, exact, name=f"result {index}")

    def check(variant: Gate) -> None:
        ours = variant.forward(tensors[1].bfloat16(), biases[0].bfloat16(), routes)
        assert_as_accurate(ours, naive[2], truth[2])

    assert_rejects(check, {"no shift": replace(gate, shift=gate.shift - 1), "alpha": replace(gate, alpha=0.5)})
