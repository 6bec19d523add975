"""Architectures of transformers by name: trained exactly, or refused with a reason. Only this table knows names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_fpdt import apply_fpdt
from tests.helpers.models import (
    PLUGIN,
    TOLERANCE,
    TOLERANCE_FP32,
    assert_same_step,
    broken_steps,
    tiny,
    tokens,
    train_step,
)
from tests.helpers.support import assert_rejects

Config = dict[str, Any]

FULL: Config = {"layer_types": ["full_attention"] * 2}
# A window that no layer has; the configs insist on a number.
NO_WINDOW: Config = {**FULL, "sliding_window": 64}
GPT2: Config = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
# Its head dimension is said by layer, and is the same in all of these.
GEMMA4: Config = {**NO_WINDOW, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "attention_k_eq_v": False}
EXPERTS: Config = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED: Config = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}

DENSE: dict[str, Config] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": NO_WINDOW,
    "ernie4_5": {},
    "gemma": {},
    "gemma3_text": NO_WINDOW,
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {"use_parallel_residual": False, "rotary_pct": 0.5},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "nemotron": {},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": NO_WINDOW,
    "persimmon": {},
    "phi": {"resid_pdrop": 0.0},
    "phi3": {"resid_pdrop": 0.0},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "seed_oss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_parallel_residual": True},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
}
# Experts are computed by a kernel that refuses float64, so these are compared in fp32.
MIXTURES: dict[str, Config] = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "flex_olmo": {"num_experts": 4, **EXPERTS},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1, **EXPERTS},
}
# Of families that came to the attention registry later than the oldest release that is served.
LATER: dict[str, Config] = {"gptj": {**GPT2, "rotary_dim": 4}}
CLASSES = {name: AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name))] for name in LATER}
DENSE |= {name: config for name, config in LATER.items() if CLASSES[name]._can_set_attn_implementation()}
SERVED = {**DENSE, **MIXTURES}


def settings(name: str) -> tuple[torch.dtype, float]:
    """The dtype an architecture is compared in, and the tolerance."""
    return (torch.float32, TOLERANCE_FP32) if name in MIXTURES else (torch.float64, TOLERANCE)


def make(name: str) -> PreTrainedModel:
    dtype, _ = settings(name)
    try:
        return tiny(name, dtype=dtype, **SERVED[name])
    except ValueError:  # some have no SDPA
        return tiny(name, attention="eager", dtype=dtype, **SERVED[name])


@pytest.mark.parametrize("name", SERVED)
def test_full_fine_tuning_is_exact(name: str) -> None:
    ids, (_, tolerance) = tokens(2, 37), settings(name)
    model = make(name)
    truth, broken = train_step(model, ids), broken_steps(model, ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth, tolerance)
    assert_rejects(lambda step: assert_same_step(step, truth, tolerance), broken)


def with_lora(model: PreTrainedModel) -> nn.Module:
    """Adapters on every linear that do something from the first step."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("name", SERVED)
def test_lora_is_exact(name: str) -> None:
    ids, (_, tolerance) = tokens(2, 37), settings(name)
    model = with_lora(make(name))
    truth, broken = train_step(model, ids), broken_steps(model, ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth, tolerance)
    assert_rejects(lambda step: assert_same_step(step, truth, tolerance), broken)


@pytest.mark.parametrize(
    ("name", "scale"), [("cohere", {"logit_scale": 1.0}), ("granite", {"logits_scaling": 1.0})], ids=str
)
def test_the_scale_of_the_logits_is_in_the_loss(name: str, scale: Config) -> None:
    """A loss from the head's weight alone would miss it."""
    ids = tokens(2, 37)
    model, unscaled = make(name), tiny(name, **{**SERVED[name], **scale})
    truth, wrong = train_step(model, ids), train_step(unscaled, ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), {"logits not scaled": wrong})


def test_the_final_softcap_is_in_the_loss() -> None:
    ids, config = tokens(2, 37), {**NO_WINDOW, "attn_logit_softcapping": None}
    model = tiny("gemma2", attention="eager", **config, final_logit_softcapping=3.0)
    unbounded = tiny("gemma2", attention="eager", **config, final_logit_softcapping=None)
    truth, wrong = train_step(model, ids), train_step(unbounded, ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), {"logits not bounded": wrong})


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "cohere2"])
def test_a_window_that_no_layer_has_does_not_limit_the_length(name: str) -> None:
    ids, config = tokens(1, 37), {**FULL, "sliding_window": 8}
    model = tiny(name, **config)
    truth, broken = train_step(model, ids), broken_steps(model, ids)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, ids), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), broken)
    with torch.no_grad():
        assert torch.isclose(model(input_ids=ids, labels=ids).loss.float(), truth.loss, rtol=TOLERANCE)


MAMBA: Config = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2}
REFUSED: dict[str, tuple[Config, str]] = {
    "bloom": ({"n_layer": 2}, "ignores the attention registry"),
    "falcon": ({}, "ignores the attention registry"),
    "jamba": ({**MAMBA, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, "Mamba-1"),
    "gemma4_text": (
        {**GEMMA4, "layer_types": ["sliding_attention", "full_attention"]},
        r"differ in head_dim \(8, 16\)",
    ),
    "gpt_neo": ({"attention_types": [[["global"], 2]], "num_layers": 2}, "ignores the attention registry"),
    "mamba": ({"state_size": 8}, "Mamba-1"),
    "modernbert-decoder": ({}, "no stack of decoder layers"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ignores the attention registry"),
    "roberta": ({"is_decoder": True}, "no stack of decoder layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_exact_is_refused(name: str) -> None:
    config, reason = REFUSED[name]
    model = tiny(name, attention="eager", dtype=torch.float32, **config)
    with pytest.raises(NotImplementedError, match=reason):
        apply_fpdt(model, PLUGIN)


def test_keys_and_values_of_another_layer_are_refused() -> None:
    model = tiny("gemma4_text", **{**GEMMA4, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3})
    model.config.num_kv_shared_layers = 1
    with pytest.raises(NotImplementedError, match="keys and values from another layer"):
        apply_fpdt(model, PLUGIN)


LATENT: Config = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What only shows when the layers are tried.
REFUSED_BY_TRIAL: dict[str, tuple[Config, str]] = {
    "diffllama": ({}, "layer 0 .* calls its attention function twice"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "does not run its base model"),
}


@pytest.mark.parametrize("name", REFUSED_BY_TRIAL)
def test_a_family_that_cannot_be_exact_is_refused_before_any_step(name: str) -> None:
    config, reason = REFUSED_BY_TRIAL[name]
    model = tiny(name, dtype=torch.float32, **config)
    with pytest.raises(NotImplementedError, match=f"^hf_fpdt: .*{reason}") as refused:
        apply_fpdt(model, PLUGIN)
    assert str(refused.value).count("hf_fpdt: ") == 1, "the prefix of what it goes round is left out"
    assert train_step(model, tokens(1, 23)).loss.isfinite(), "what was refused runs as before"


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "glm4v_moe"])
def test_positions_with_three_axes_are_refused_before_any_step(name: str) -> None:
    """Text beside images: its layers get the positions of time, height and width."""
    config = AutoConfig.for_model(name)
    text, vision = config.get_text_config(), config.vision_config
    sizes = {"hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 128, "vocab_size": 2000, "n_routed_experts": 4}
    for key, value in {**sizes, "num_experts_per_tok": 2, "first_k_dense_replace": 1}.items():
        if hasattr(text, key):
            setattr(text, key, value)
    text.mlp_layer_types = text.mlp_layer_types[:1] if getattr(text, "mlp_layer_types", None) else None
    for key, value in {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 256}.items():
        if hasattr(vision, key):
            setattr(vision, key, value)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(NotImplementedError, match=r"layer 0 .* got 'position_ids' of shape \(3, 1, 48\)"):
        apply_fpdt(model, PLUGIN)
