"""Tiny configurations: small in every size, and with every feature of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fpdt.commands.check.tiny_config import INTERMEDIATE, VOCABULARY, WINDOW, shrunk
from hf_fpdt.model.shapes import SHAPES
from hf_fpdt.plan.by_layer import LayersDiffer

MOST_PARAMETERS = 40_000_000


def built(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_keeps_what_attention_sees_and_becomes_small(name: str) -> None:
    config: Any = SHAPES[name]()
    small = shrunk(config)
    for feature in ("head_dim", "rope_parameters", "tie_word_embeddings", "model_type", "hidden_act"):
        assert getattr(small, feature, None) == getattr(config, feature, None), feature
    heads, kv_heads = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    assert kv_heads is None or heads // kv_heads == min(8, config.num_attention_heads // config.num_key_value_heads)
    assert abs(small.hidden_size / heads - config.hidden_size / config.num_attention_heads) < 1, "a whole number"
    for width in ("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "ssm_state_size"):
        assert getattr(small, width, None) == getattr(config, width, None), "kernels are compiled for it"
    assert sum(p.numel() for p in built(small).parameters()) < MOST_PARAMETERS
    assert config.num_hidden_layers > 2 and config.vocab_size > VOCABULARY, "the large one is as it was"


@pytest.mark.parametrize(
    ("name", "large", "expected"),
    [
        ("llama", {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}, (14, 2, 1792)),
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}, (8, 1, 1024)),
        ("llama", {"num_attention_heads": 64, "num_key_value_heads": 2, "hidden_size": 4096}, (16, 2, 1024)),
        ("qwen3", {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024}, (4, 2, 256)),
    ],
)
def test_heads_keep_their_ratio(name: str, large: dict[str, int], expected: tuple[int, int, int]) -> None:
    small = shrunk(AutoConfig.for_model(name, **large))
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == expected


def test_every_kind_of_layer_is_kept() -> None:
    small = shrunk(AutoConfig.for_model("gemma3_text"))
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.sliding_window == WINDOW
    small = shrunk(AutoConfig.for_model("smollm3"))
    assert small.num_hidden_layers == len(small.no_rope_layers) == 2 and set(small.no_rope_layers) == {0, 1}


def test_layers_that_differ_are_made_small_one_by_one() -> None:
    small = shrunk(AutoConfig.for_model("gemma4_text"))
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.head_dim for layer in small.per_layer_config] == [256, 512], "kernels are chosen by it"
    assert {layer.hidden_size for layer in small.per_layer_config} == {small.hidden_size} and small.hidden_size < 2000
    assert sum(p.numel() for p in built(small).parameters()) < MOST_PARAMETERS
    widths = {i: {"intermediate_size": 5000 + i} for i in range(4)}
    large = AutoConfig.for_model("qwen3", num_hidden_layers=6, intermediate_size=40, per_layer_config=widths)
    small = shrunk(large)
    assert [layer.intermediate_size for layer in small.per_layer_config] == [INTERMEDIATE] * 4
    heads = AutoConfig.for_model("qwen3", per_layer_config={0: {"num_attention_heads": 8}})
    with pytest.raises(LayersDiffer, match=r"num_attention_heads \(8, 32\)"):
        shrunk(heads)


def test_layers_that_a_list_names_are_still_those() -> None:
    small = shrunk(AutoConfig.for_model("qwen2_moe", num_hidden_layers=6, mlp_only_layers=[0, 1, 4]))
    assert small.num_hidden_layers == 2 and small.mlp_only_layers == [0], "one dense layer and one of experts"


def test_experts_are_fewer_and_dropout_is_off() -> None:
    small = shrunk(AutoConfig.for_model("qwen3_moe"))
    assert small.num_experts == 8 and small.num_experts_per_tok == 2 and small.moe_intermediate_size == 64
    small = shrunk(AutoConfig.for_model("phi", resid_pdrop=0.1, embd_pdrop=0.1))
    assert small.resid_pdrop == small.embd_pdrop == 0.0
    assert shrunk(AutoConfig.for_model("biogpt")).attention_probs_dropout_prob == 0.0
    assert shrunk(AutoConfig.for_model("phimoe")).router_jitter_noise == 0.0


def test_token_ids_lie_in_the_vocabulary() -> None:
    small = shrunk(AutoConfig.for_model("llama", pad_token_id=31_000, eos_token_id=[5000, 5001]))
    assert small.pad_token_id == 0 and small.eos_token_id == 2
    assert built(small).get_input_embeddings().weight.shape[0] == VOCABULARY  # type: ignore[operator]
