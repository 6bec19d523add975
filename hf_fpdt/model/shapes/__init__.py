"""Known models as configurations, models with random weights made from one, and their sizes for the planner.

Sizes decide what a step takes, so nothing is downloaded. Two things are not as published, for lengths that the models
were not made for: up to 2M positions, and plain RoPE with the model's theta.

In reading order:

    dense            models whose layers attend to all before them
    attention_kinds  windows, sinks, latent attention
    recurrent        gated delta nets and Mamba-2 beside attention
    build            models from a configuration; sizes for the planner
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from transformers import PreTrainedConfig

from .attention_kinds import deepseek_v2_lite, gemma3_27b, gpt_oss_20b, mistral_7b, olmo3_7b
from .build import LORA_RANK, build_random, training_of, training_of_model, with_layers, with_lora
from .dense import MAX_POSITIONS, llama_1b, llama_8b, llama_70b, neox_6_9b, qwen3_30b_a3b, qwen3_32b
from .recurrent import granite4_h_small, nemotron3_nano, qwen3_next_80b, qwen35_9b, qwen35_27b, qwen35_35b_a3b

__all__ = [
    "LORA_RANK",
    "MAX_POSITIONS",
    "SHAPES",
    "build_random",
    "llama_8b",
    "neox_6_9b",
    "training_of",
    "training_of_model",
    "with_layers",
    "with_lora",
]

SHAPES: MappingProxyType[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "llama-8b": llama_8b,
        "llama-1b": llama_1b,
        "llama-70b": llama_70b,
        "qwen3-32b": qwen3_32b,
        "qwen3-30b-a3b": qwen3_30b_a3b,
        "neox-6.9b": neox_6_9b,
        "gpt-oss-20b": gpt_oss_20b,
        "gemma3-27b": gemma3_27b,
        "olmo3-7b": olmo3_7b,
        "mistral-7b": mistral_7b,
        "deepseek-v2-lite": deepseek_v2_lite,
        "qwen3.5-9b": qwen35_9b,
        "qwen3.5-27b": qwen35_27b,
        "qwen3.5-35b-a3b": qwen35_35b_a3b,
        "qwen3-next-80b": qwen3_next_80b,
        "nemotron-3-nano": nemotron3_nano,
        "granite-4-h-small": granite4_h_small,
    }
)
