"""Models whose layers attend to all before them."""

from __future__ import annotations

from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

MAX_POSITIONS = 2 * 1024**2


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


def qwen3_30b_a3b() -> Qwen3MoeConfig:
    """Qwen3-30B-A3B (Qwen3-Coder-30B-A3B but for the theta): 48 layers, 128 experts, 30,532,122,624 parameters."""
    return Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
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
