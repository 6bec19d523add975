"""Models with windows, sinks and latent attention."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV2Config, Gemma3TextConfig, GptOssConfig, MistralConfig, Olmo3Config

from .dense import MAX_POSITIONS


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
