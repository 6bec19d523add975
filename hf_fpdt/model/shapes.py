"""Known models as configurations, models with random weights made from one, and their sizes for the planner.

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
    DeepseekV2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ..config import AUTO_CHUNK_TOKENS_GPU
from ..forecast import Training, Weights
from ..memory import parameter_count
from ..plan import ModelSizes, take_layers
from .layers import decoder_layers
from .settings import auto_loss_tokens

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


def gpt_oss_20b() -> GptOssConfig:
    """gpt-oss-20b: 24 layers of 32 experts, every other one with a window of 128 keys, 20,914,757,184 parameters."""
    return GptOssConfig(
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def gemma3_27b() -> Gemma3TextConfig:
    """The text part of Gemma-3-27B: 62 layers, of six five with a window of 1,024 keys, 27,009,346,304 parameters."""
    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=5376,
        intermediate_size=21_504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        sliding_window=1024,
        rms_norm_eps=1e-6,
        rope_parameters=_rope_by_kind(sliding=10_000.0, full=1_000_000.0),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )


def olmo3_7b() -> Olmo3Config:
    """OLMo-3-7B: 32 layers, of four three with a window of 4,096 keys, 7,298,011,136 parameters."""
    return Olmo3Config(
        vocab_size=100_278,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        sliding_window=4096,
        rms_norm_eps=1e-6,
        rope_parameters=_rope_by_kind(sliding=500_000.0, full=500_000.0),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def mistral_7b() -> MistralConfig:
    """Mistral-7B-v0.1: 32 layers, all with a window of 4,096 keys, 7,241,732,096 parameters."""
    return MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def deepseek_v2_lite() -> DeepseekV2Config:
    """DeepSeek-V2-Lite: 27 layers, keys 192 wide and values 128, experts but in one; 15,706,484,224 parameters."""
    return DeepseekV2Config(
        vocab_size=102_400,
        hidden_size=2048,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def _rope_by_kind(*, sliding: float, full: float) -> dict[str, Any]:
    """Of layers with a window and without."""
    thetas = {"sliding_attention": sliding, "full_attention": full}
    return {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}


SHAPES: MappingProxyType[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "llama-8b": llama_8b,
        "llama-1b": llama_1b,
        "llama-70b": llama_70b,
        "qwen3-32b": qwen3_32b,
        "neox-6.9b": neox_6_9b,
        "gpt-oss-20b": gpt_oss_20b,
        "gemma3-27b": gemma3_27b,
        "olmo3-7b": olmo3_7b,
        "mistral-7b": mistral_7b,
        "deepseek-v2-lite": deepseek_v2_lite,
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


def training_of(config: PreTrainedConfig, *, lora: bool) -> Training:
    """Sizes of a model with this configuration; it is built without memory for its weights, to count them."""
    return training_of_model(build_random(config, "meta", torch.bfloat16, False), lora=lora)


def training_of_model(model: PreTrainedModel, *, lora: bool) -> Training:
    """Sizes of a model; with `lora` its adapters are put into it, and what they train is counted."""
    if lora:
        with_lora(model)
    layers = decoder_layers(model)
    inside = [list(layer.parameters()) for layer in layers]
    total, trained = parameter_count(model.parameters()), parameter_count(model.parameters(), trained=True)
    in_layers = [parameter_count(parameters, trained=True) for parameters in inside]
    text = model.config.get_text_config()
    largest = max(map(parameter_count, inside))
    return Training(
        model=ModelSizes.of(text, layers=len(layers), layer_parameters=largest),
        weights=Weights(
            total=total,
            trained=trained,
            largest_trained=max(trained - sum(in_layers), *in_layers),
            outside=total - sum(map(parameter_count, inside)),
        ),
        vocabulary=text.vocab_size,
        chunk_tokens=AUTO_CHUNK_TOKENS_GPU,
        loss_tokens=auto_loss_tokens(text.vocab_size),
    )
