"""Windows and widths of heads by layer, as the configurations of real models say them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fpdt.layout.spans import Block
from hf_fpdt.model.shapes import SHAPES
from hf_fpdt.plan.by_layer import attention_sizes, is_latent, latent_weights, windows_of
from tests.helpers.support import assert_rejects

# (model type, settings, windows of the first layers, layers with a window)
WINDOWS: list[tuple[str, dict[str, Any], Sequence[int | None], int]] = [
    ("mistral", {}, [4096] * 3, 32),
    ("mistral", {"sliding_window": None}, [None] * 3, 0),
    ("mixtral", {}, [None] * 3, 0),
    ("mixtral", {"sliding_window": 64}, [64] * 3, 32),
    ("phi3", {"sliding_window": 2047}, [2047] * 3, 32),
    ("phimoe", {"sliding_window": 2047}, [2047] * 3, 32),
    ("starcoder2", {"sliding_window": 4096}, [4096] * 3, 30),
    ("qwen2", {"sliding_window": 4096}, [None] * 3, 0),
    ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 9], 30),
    ("qwen2_moe", {}, [None] * 3, 0),
    ("qwen2_moe", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, [9, None, None], 1),
    ("gemma2", {}, [4096, None, 4096, None], 13),
    ("gemma3", {}, [4096] * 5 + [None, 4096], 22),
    ("gemma3_text", {"sliding_window": 1024}, [1024] * 5 + [None, 1024], 22),
    ("olmo3", {}, [4096] * 3 + [None, 4096], 24),
    ("gpt_oss", {}, [128, None, 128, None], 18),
    ("cohere2", {}, [4096] * 3 + [None, 4096], 30),
    ("exaone4", {}, [4096] * 3 + [None, 4096], 24),
    ("llama4_text", {}, [Block(8192), Block(8192), Block(8192), None], 36),
    ("llama", {}, [None] * 3, 0),
    ("mistral", {"num_hidden_layers": 3, "per_layer_config": {1: {"sliding_window": 7}}}, [4096, 7, 4096], 3),
    ("mistral", {"num_hidden_layers": 3, "per_layer_config": {2: {"sliding_window": None}}}, [4096, 4096, None], 2),
    ("gemma3_text", {"num_hidden_layers": 3, "per_layer_config": {1: {"sliding_window": 7}}}, [4096, 7, 4096], 3),
    ("gemma4_text", {}, [512] * 5 + [None, 512], 25),
]


def assert_windows(windows: Callable[[Any], list[int | None]]) -> None:
    for name, settings, first, count in WINDOWS:
        config = AutoConfig.for_model(name, **settings).get_text_config()
        found = windows(config)
        assert found[: len(first)] == first, (name, settings)
        assert len(found) == config.num_hidden_layers and len(found) - found.count(None) == count, (name, settings)


def test_windows_are_those_of_each_layer() -> None:
    assert_windows(windows_of)

    def one_for_all(config: Any) -> list[int | None]:
        return [next((window for window in windows_of(config) if window), None)] * config.num_hidden_layers

    def kinds_forgotten(config: Any) -> list[int | None]:
        config.layer_types = None
        return windows_of(config)

    def zero_is_a_window(config: Any) -> list[int | None]:
        return [0 if window is None else window for window in windows_of(config)]

    assert_rejects(
        assert_windows,
        {
            "one for all layers": one_for_all,
            "kinds of layers forgotten": kinds_forgotten,
            "none is zero": zero_is_a_window,
            "from the last layer": lambda config: windows_of(config)[::-1],
        },
    )


def test_a_window_of_zero_keys_and_one_that_is_switched_off_are_none() -> None:
    for settings in ({"sliding_window": 0}, {"sliding_window": 64, "use_sliding_window": False}):
        assert windows_of(AutoConfig.for_model("mistral", **settings)) == [None] * 32


def test_heads_of_a_latent_have_two_widths_and_a_key_for_every_query() -> None:
    sizes = {name: attention_sizes(AutoConfig.for_model(name)) for name in ("deepseek_v3", "mistral4", "llama")}
    assert sizes["deepseek_v3"] == (128, 128, 192, 128)
    assert sizes["mistral4"] == (32, 32, 128, 128)
    assert sizes["llama"] == (32, 32, 128, 128) and not is_latent(AutoConfig.for_model("llama"))
    grouped = attention_sizes(AutoConfig.for_model("mistral"))
    assert (grouped.q_heads, grouped.kv_heads, grouped.head_dim, grouped.value_dim) == (32, 8, 128, 128)


LATENT: dict[str, dict[str, Any]] = {
    "queries of a latent too": {"model": "deepseek_v2", "q_lora_rank": 24},
    "queries of hidden states": {"model": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v3": {"model": "deepseek_v3", "q_lora_rank": 24},
}


@pytest.mark.parametrize("name", LATENT)
def test_weights_around_a_latent_are_those_of_the_model(name: str) -> None:
    settings = {**LATENT[name], "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 4, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    config = AutoConfig.for_model(
        settings.pop("model"), **settings, v_head_dim=12, vocab_size=32, intermediate_size=32, first_k_dense_replace=1
    )
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn

    def check(weights: int) -> None:
        assert weights == sum(p.numel() for p in attention.parameters() if p.dim() == 2)

    check(latent_weights(config))
    config.v_head_dim += 1
    assert_rejects(check, {"values wider": latent_weights(config)})


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_window_for_each_layer(name: str) -> None:
    config: Any = SHAPES[name]()
    counts = {"gpt-oss-20b": 12, "gemma3-27b": 52, "olmo3-7b": 24, "mistral-7b": 32}
    windows = windows_of(config)
    assert len(windows) == config.num_hidden_layers
    assert len(windows) - windows.count(None) == counts.get(name, 0)
