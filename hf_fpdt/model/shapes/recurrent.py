"""Models with recurrent layers beside those that attend."""

from __future__ import annotations

from types import MappingProxyType

from transformers import (
    GraniteMoeHybridConfig,
    NemotronHConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from .dense import MAX_POSITIONS

_ROPE = MappingProxyType({"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25})
# Kinds of Nemotron 3's layers by the letters of its reports, M a Mamba-2, E experts, * attention.
_LETTERS = MappingProxyType({"M": "linear_attention", "E": "moe", "*": "full_attention"})
_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _every_fourth(layers: int) -> list[str]:
    """Attention in every fourth layer."""
    return ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(layers)]


def qwen35_9b() -> Qwen3_5TextConfig:
    """Qwen3.5-9B's text model: 32 layers, 24 of them gated delta nets, 8,953,803,264 parameters."""
    return Qwen3_5TextConfig(
        vocab_size=248_320,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        layer_types=_every_fourth(32),
        rope_parameters=dict(_ROPE),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def qwen35_27b() -> Qwen3_5TextConfig:
    """Qwen3.5-27B's text model: 64 layers, 48 of them gated delta nets, 26,895,998,464 parameters."""
    return Qwen3_5TextConfig(
        vocab_size=248_320,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        layer_types=_every_fourth(64),
        rope_parameters=dict(_ROPE),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def qwen35_35b_a3b() -> Qwen3_5MoeTextConfig:
    """Qwen3.5-35B-A3B's text model: 40 layers, 30 of them gated delta nets, 256 experts, 34,660,610,688 parameters."""
    return Qwen3_5MoeTextConfig(
        vocab_size=248_320,
        hidden_size=2048,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        layer_types=_every_fourth(40),
        rope_parameters=dict(_ROPE),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def qwen3_next_80b() -> Qwen3NextConfig:
    """Qwen3-Next-80B-A3B: 48 layers, 36 of them gated delta nets, 512 experts, 79,674,391,296 parameters."""
    return Qwen3NextConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        layer_types=_every_fourth(48),
        rope_parameters=dict(_ROPE),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def nemotron3_nano() -> NemotronHConfig:
    """Nemotron-3-Nano-30B-A3B: 52 layers, 23 Mamba-2, 23 of experts, 6 attention, 31,577,937,344 parameters."""
    return NemotronHConfig(
        vocab_size=131_072,
        hidden_size=2688,
        intermediate_size=1856,
        num_hidden_layers=len(_NANO),
        layers_block_type=[_LETTERS[letter] for letter in _NANO],
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
        chunk_size=128,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def granite4_h_small() -> GraniteMoeHybridConfig:
    """Granite-4.0-H-Small: 40 layers, 36 of them Mamba-2, 72 experts, 32,207,337,984 parameters."""
    return GraniteMoeHybridConfig(
        vocab_size=100_352,
        hidden_size=4096,
        intermediate_size=768,
        shared_intermediate_size=1536,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        layer_types=["full_attention" if layer % 10 == 5 else "linear_attention" for layer in range(40)],
        mamba_n_heads=128,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_d_state=128,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=256,
        num_local_experts=72,
        num_experts_per_tok=10,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )
