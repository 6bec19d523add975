"""Sizes of known models as configurations, and models with random weights made from one: for measurements.

Sizes decide what a step takes, so nothing is downloaded. Two things are not as published, for lengths that the models
were not made for: up to 2M positions, and plain RoPE with the model's theta.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ..plan import take_layers

MAX_POSITIONS = 2 * 1024**2
LORA_RANK = 16


def llama_8b() -> LlamaConfig:
    """Llama-3.1-8B: 32 layers, 8,030,261,248 parameters."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def llama_1b() -> LlamaConfig:
    """Llama-3.2-1B: 16 layers, embeddings tied to the head, 1,235,814,400 parameters."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )


def llama_70b() -> LlamaConfig:
    """Llama-3.1-70B: 80 layers, 70,553,706,496 parameters."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def qwen3_32b() -> Qwen3Config:
    """Qwen3-32B: 64 layers whose heads together are wider than its hidden states, 32,762,123,264 parameters."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def neox_6_9b() -> GPTNeoXConfig:
    """Pythia-6.9B, a GPT-NeoX: 32 layers, a key head for every query head, 6,857,302,016 parameters."""
    return GPTNeoXConfig(
        vocab_size=50_432,
        hidden_size=4096,
        intermediate_size=16_384,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


SHAPES: MappingProxyType[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "llama-8b": llama_8b,
        "llama-1b": llama_1b,
        "llama-70b": llama_70b,
        "qwen3-32b": qwen3_32b,
        "neox-6.9b": neox_6_9b,
    }
)


def with_layers(config: PreTrainedConfig, n_layers: int) -> PreTrainedConfig:
    """The configuration with its number of layers changed in place, and returned."""
    text: Any = config.get_text_config()
    take_layers(text, [i % text.num_hidden_layers for i in range(n_layers)])
    return config


def build_random(
    config: PreTrainedConfig, device: torch.device | str, dtype: torch.dtype, lora: bool
) -> PreTrainedModel:
    """A model in training mode with the weights of a new one, made on the device: a CPU takes a minute for them.

    Args:
        config: its sizes, such as `llama_8b()` or one of `AutoConfig.from_pretrained`.
        device: where the weights are made and stay.
        dtype: of every parameter, adapters included.
        lora: train adapters of rank 16 on every linear and freeze the rest; False: train every weight.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return (with_lora(model) if lora else model).train()


def with_lora(model: PreTrainedModel) -> Any:
    """The model with adapters of rank 16 on every linear, of its own dtype, and all else frozen."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT still asks by the old name of a property; nothing a user could change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear")
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
