"""What the examples share: a tiny Llama made from a config, and real text (this Python's own argparse.py) as bytes."""

import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_BYTES = 256


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Random weights; in your code, AutoModelForCausalLM.from_pretrained(name, attn_implementation="fpdt")."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_BYTES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="fpdt",
    )
    return LlamaForCausalLM(config)


def byte_windows(length_tokens: int, count: int) -> torch.Tensor:
    """[count, length_tokens] consecutive windows of the bytes of argparse.py."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[: length_tokens * count]
    return torch.tensor(list(text)).view(count, length_tokens)
