"""Shapes have the published sizes, and models of random weights are ready to train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from hf_fpdt.model.shapes import SHAPES, build_random, with_layers

PARAMETERS = {
    "llama-8b": 8_030_261_248,
    "llama-1b": 1_235_814_400,
    "llama-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "neox-6.9b": 6_857_302_016,
    "gpt-oss-20b": 20_914_757_184,
    "gemma3-27b": 27_009_346_304,
    "olmo3-7b": 7_298_011_136,
    "mistral-7b": 7_241_732_096,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3-next-80b": 79_674_391_296,
    "nemotron-3-nano": 31_577_937_344,
    "granite-4-h-small": 32_207_337_984,
}
THETAS = {
    **dict.fromkeys(("llama-8b", "llama-1b", "llama-70b", "olmo3-7b"), 500_000.0),
    **dict.fromkeys(("qwen3-32b", "qwen3-30b-a3b"), 1_000_000.0),
    "gpt-oss-20b": 150_000.0,
    **dict.fromkeys(("qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3-next-80b"), 10_000_000.0),
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 80}


def shrunken(name: str) -> PreTrainedConfig:
    """Two thin layers of the shape's architecture, or one of each kind."""
    config: Any = with_layers(SHAPES[name](), 3 if "nemotron" in name else 2)
    grouped = {"num_key_value_heads": 2, "head_dim": 8} if "neox" not in name else {}
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    few = {"moe_intermediate_size": 24, "n_routed_experts": 8, "first_k_dense_replace": 1, **latent}
    grouped |= {**few, "num_key_value_heads": 4} if "deepseek" in name else {}
    grouped |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16} if "qwen3" in name else {}
    grouped |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8} if "granite" in name else {}
    mixer = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
    grouped |= {**mixer, "moe_intermediate_size": 16, "n_routed_experts": 8} if "nemotron" in name else {}
    for key, value in {**SMALL, **grouped}.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name]())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_take_sequences_of_millions(name: str) -> None:
    config: Any = SHAPES[name]()
    if not hasattr(config, "rope_parameters"):
        assert config.max_position_embeddings == 2 * 1024**2, "without rotary embeddings"
        return
    ropes = config.rope_parameters if "rope_type" not in config.rope_parameters else {"all": config.rope_parameters}
    assert config.max_position_embeddings == 2 * 1024**2 and {rope["rope_type"] for rope in ropes.values()} == {
        "default"
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SHAPES)
def test_random_model_has_a_finite_loss_and_the_gradients_asked_for(name: str, lora: bool) -> None:
    model = build_random(shrunken(name), "cpu", torch.bfloat16, lora)
    # Transformers has DeepSeek's routers in fp32, whatever is asked for.
    routers = {p for key, p in model.named_parameters() if ".gate." in key}
    assert model.training and {p.dtype for p in set(model.parameters()) - routers} == {torch.bfloat16}
    ids = torch.randint(0, SMALL["vocab_size"], (1, 24))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, parameter in model.named_parameters() if "lora_" in key or not lora}


@pytest.mark.parametrize("name", SHAPES)
def test_random_model_keeps_rope_in_fp32(name: str) -> None:
    model = build_random(shrunken(name), "cpu", torch.bfloat16, lora=False)
    buffers = {key: buffer for key, buffer in model.named_buffers() if key.endswith("inv_freq") and "orig" not in key}
    if not buffers:
        assert name in ("nemotron-3-nano", "granite-4-h-small"), "which have no rotary embeddings"
        return
    inv_freq = next(buffer for key, buffer in buffers.items() if "sliding_attention" in key or len(buffers) == 1)
    rotated = 8 // 4 if name.startswith(("neox", "qwen3.5", "qwen3-next")) else 8
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert torch.allclose(inv_freq, THETAS.get(name, 10_000.0) ** -(torch.arange(0, rotated, 2) / rotated))


def test_layers_are_cut_with_their_kinds() -> None:
    config: Any = with_layers(Qwen3Config(**SMALL, num_hidden_layers=6, num_key_value_heads=2, head_dim=8), 3)
    assert config.num_hidden_layers == len(config.layer_types) == 3
    assert len(build_random(config, "cpu", torch.float32, lora=False).model.layers) == 3
    alternating = Qwen3Config(**SMALL, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    kinds = [with_layers(copy.deepcopy(alternating), n).layer_types.count("full_attention") for n in (1, 2, 5, 7)]
    assert kinds == [0, 1, 1, 1], "no kind is left out that there is room for"
    own = Qwen3Config(num_hidden_layers=2, intermediate_size=8, per_layer_config={1: {"intermediate_size": 9}})
    many: Any = with_layers(own, 5)
    assert [layer.intermediate_size for layer in many.per_layer_config] == [8, 9, 8, 9, 8]
