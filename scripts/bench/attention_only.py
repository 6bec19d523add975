"""Writes the configuration of a model that is attention and next to nothing else: what attention alone is measured on.

    python scripts/bench/attention_only.py FOLDER [--heads 32] [--kv-heads 32] [--window KEYS]

One Llama layer of heads of 128 whose MLP is 8 wide and whose vocabulary has 32 tokens; with a window one of Mistral's.
Projections, RoPE and norms are there, as they are in DeepSpeed's FPDT_Attention but for the norms.
"""

import argparse
from pathlib import Path

from transformers import LlamaConfig, MistralConfig

from hf_fpdt.model.shapes import MAX_POSITIONS

HEAD_DIM = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--window", type=int, help="keys that a query sees")
    options = parser.parse_args()
    window = {} if options.window is None else {"sliding_window": options.window}
    (MistralConfig if window else LlamaConfig)(
        vocab_size=32,
        hidden_size=options.heads * HEAD_DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        **window,
    ).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
