"""Which pieces of a model are replaced, told by their code; on a GPU, that what replaces them computes the same."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama

import hf_fpdt.model.apply
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import FEW, in_double
from hf_fpdt.model import fused
from hf_fpdt.model.layers import decoder_layers, raw_forward_of
from hf_fpdt.model.liger import load_liger, why_not_liger
from tests.helpers.models import GROUPED, SIZES
from tests.helpers.support import assert_as_accurate, assert_rejects

# What is found in one layer of an architecture: norms, gated MLP, attention for its rotary embedding, unread linears.
PROJECTIONS = " self_attn.q_proj self_attn.k_proj self_attn.v_proj"
OLMO = "post_attention_layernorm post_feedforward_layernorm self_attn.q_norm self_attn.k_norm mlp self_attn"
GEMMA_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
FOUND = {
    "llama": "input_layernorm post_attention_layernorm mlp self_attn" + PROJECTIONS,
    "mistral": "input_layernorm post_attention_layernorm mlp self_attn" + PROJECTIONS,
    "qwen2": "input_layernorm post_attention_layernorm mlp self_attn" + PROJECTIONS,
    "qwen3": "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm mlp self_attn" + PROJECTIONS,
    # Its norm adds one to the weight, which has a kernel of its own.
    "gemma": "input_layernorm post_attention_layernorm mlp self_attn" + PROJECTIONS,
    "gemma2": " ".join(f"{place}_layernorm" for place in GEMMA_NORMS) + " mlp self_attn" + PROJECTIONS,
    "gemma3_text": " ".join(f"{place}_layernorm" for place in GEMMA_NORMS)
    + " self_attn.q_norm self_attn.k_norm mlp self_attn"
    + PROJECTIONS,
    "olmo2": OLMO + PROJECTIONS,
    "olmo3": OLMO + PROJECTIONS,
    "cohere2": "mlp",  # its rotary embedding and its norm are others
    "qwen3_5_text": "input_layernorm post_attention_layernorm mlp",  # a recurrent layer
    "granite": "input_layernorm post_attention_layernorm mlp self_attn" + PROJECTIONS,
    "gpt_oss": "input_layernorm post_attention_layernorm self_attn" + PROJECTIONS,
    "qwen3_moe": "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm self_attn" + PROJECTIONS,
    "deepseek_v3": "input_layernorm post_attention_layernorm self_attn.q_a_layernorm self_attn.kv_a_layernorm "
    "mlp.shared_experts",
    "mixtral": "input_layernorm post_attention_layernorm self_attn" + PROJECTIONS,
    "qwen2_moe": "input_layernorm post_attention_layernorm self_attn mlp.shared_expert" + PROJECTIONS,
    "olmoe": "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm",
    "gpt_neox": "attention attention.query_key_value",
}


def layer_of(name: str) -> Any:
    config = AutoConfig.for_model(name)
    grouped = {key: value for key, value in GROUPED.items() if key in vars(config)}
    grouped |= {"first_k_dense_replace": 0} if "first_k_dense_replace" in vars(config) else {}
    return decoder_layers(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **grouped})))[0]


def found_in(layer: Any) -> set[str]:
    """Names of the pieces that `fused` would replace, or leave out where attention alone would read them."""
    names = {module: name for name, module in layer.named_modules()}
    pieces = {name for module, name in names.items() if fused._twin_of(module) is not None}
    kind: Any = type(layer)
    values = fused._known_values(layer, raw_forward_of(kind))
    return pieces | {names[value.readers[0]] for value in values if value.names != fused.REST}


@pytest.mark.parametrize("name", FOUND)
def test_pieces_are_found_by_what_they_compute(name: str) -> None:
    assert found_in(layer_of(name)) == set(FOUND[name].split())


class ScaledNorm(llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


class OtherLayer(llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return 2 * super().forward(hidden_states, **kwargs)


def test_pieces_that_compute_something_else_are_left_alone() -> None:
    layer = layer_of("llama")
    layer.input_layernorm.__class__ = ScaledNorm
    layer.post_attention_layernorm.forward = lambda hidden_states: hidden_states
    layer.__class__ = OtherLayer
    assert found_in(layer) == {"mlp", "self_attn", *PROJECTIONS.split()}


def test_a_rotary_embedding_over_another_rotation_is_left_alone() -> None:
    def other_half(x: Tensor) -> Tensor:
        return x.flip(-1)

    own = inspect.unwrap(llama.LlamaAttention.forward)
    names = {**own.__globals__, "rotate_half": other_half}
    rotary = FunctionType(inspect.unwrap(llama.apply_rotary_pos_emb).__code__, names, "rotary", (1,))
    names = {**names, "apply_rotary_pos_emb": rotary}
    forward = FunctionType(own.__code__, names, "forward")
    layer = layer_of("llama")
    layer.self_attn.__class__ = type("Other", (llama.LlamaAttention,), {"forward": forward})
    assert "self_attn" not in found_in(layer) and "mlp" in found_in(layer)


def test_without_a_gpu_the_reason_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "CUDA" in (why_not_liger() or "") and load_liger() is None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SIZES, **GROUPED}))
    assert "no Liger kernels: torch finds no CUDA GPU" in str(apply_fpdt(model, FPDTPlugin()))


EVERY_EXPERT: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}

# -- on a GPU ---------------------------------------------------------------------------------------------------------


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3_text", "olmo3", "qwen3_5_text", *EVERY_EXPERT])
def test_gpu_a_model_of_twins_is_as_accurate_as_its_own_pieces(name: str) -> None:
    """bf16, against the same model in float64; with a broken variant of each kernel rejected."""
    if why_not_liger() is not None:
        pytest.skip(why_not_liger() or "")
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 500}
    heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 64} if name != "gpt_neox" else {}
    # Every token visits every expert: otherwise rounding sends some elsewhere.
    heads |= EVERY_EXPERT.get(name, {})
    # By itself plain transformers 5.17 does not train a model of recurrent layers alone.
    heads |= {"layer_types": ["linear_attention", "full_attention"]} if name == "qwen3_5_text" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **heads})).cuda().bfloat16()
    ids = torch.randint(3, 500, (2, 700), device="cuda")
    exact = results(in_double(copy.deepcopy(model)), ids)

    def with_fpdt(fused: bool) -> dict[str, Tensor]:
        ours = copy.deepcopy(model)
        handle = apply_fpdt(ours, FPDTPlugin(chunk_tokens=256, fused=fused))
        assert not fused or "Liger kernels" in str(handle)
        return results(ours, ids)

    naive = with_fpdt(False)

    def check(found: dict[str, Tensor]) -> None:
        for key, expected in exact.items():
            if name in EVERY_EXPERT and 1 < expected.numel() < FEW:
                continue  # the biases of a router: few numbers may be right by luck
            ours, own = found[key].double(), naive[key].double()
            error, bound = ((x - expected.double()).norm() for x in (ours, own))
            assert error <= 2 * bound + float(expected.norm()) * 2**-9, f"{key}: {error:.2e}, naive {bound:.2e}"

    check(with_fpdt(True))
    liger = load_liger()
    assert liger is not None
    broken = {
        "norm": {"_rms_norm": lambda x, w, eps, *rest: liger._rms_norm(x, w, eps + 1.0, *rest)},
        "gate": {
            "_silu_mul": lambda gate, up: liger._silu_mul(up, gate),
            "_gelu_mul": lambda gate, up: liger._gelu_mul(up, gate),
        },
        "rotation": {"_rotary": lambda q, k, cos, sin: liger._rotary(q, k, cos, -sin)},
    }
    missing = {"gpt_neox": ("norm", "gate"), "qwen3_5_text": ("rotation",)}.get(name, ())
    missing = ("gate",) if name in EVERY_EXPERT else missing
    broken = {what: change for what, change in broken.items() if what not in missing}
    variants = {}
    for what, change in broken.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_fpdt.model.apply, "load_liger", lambda change=change: replace(liger, **change))
            variants[what] = with_fpdt(True)
    assert_rejects(check, variants)


@pytest.mark.gpu
def test_gpu_each_kernel_is_as_accurate_as_the_code_it_stands_for() -> None:
    if why_not_liger() is not None:
        pytest.skip(why_not_liger() or "")
    liger = load_liger()
    assert liger is not None
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 65, 1000, device="cuda") for _ in range(2))
    exact = nn.functional.silu(gate.bfloat16().double()) * up.bfloat16().double()
    naive = nn.functional.silu(gate.bfloat16()) * up.bfloat16()
    assert_as_accurate(liger.silu_mul(gate.bfloat16(), up.bfloat16()), naive, exact)
    gelu = functools.partial(nn.functional.gelu, approximate="tanh")
    exact = gelu(gate.bfloat16().double()) * up.bfloat16().double()
    naive = gelu(gate.bfloat16()) * up.bfloat16()
    assert_as_accurate(liger.gelu_mul(gate.bfloat16(), up.bfloat16()), naive, exact)
    norm = llama.LlamaRMSNorm(1000).cuda().bfloat16()
    x, wide = gate.bfloat16(), copy.deepcopy(norm).double()
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon) * wide.weight
    assert_as_accurate(liger.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x), exact.detach())
