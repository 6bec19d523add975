"""One training step of a model shape at a length: seconds, tokens/s, strict causal MFU, peak device memory.

    python scripts/bench_step.py --layers 4 --seq-len 256K

Random weights in bfloat16, LoRA rank 16 on every linear (or --full), loss over random tokens, forward and backward;
the median of the steps after the first. Strict MFU counts no recomputation and attention at half:
tokens · (4·N + 6·L·S·heads·head_dim) for LoRA (6·N in full), over the GPU's dense bfloat16 rate (989 TFLOP/s, H100).
"""

import argparse
import logging
import platform
import statistics
import subprocess
import time
from datetime import date
from typing import Any

import accelerate
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.config import parse_tokens

PEAK_FLOPS = 989e12
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=parse_tokens, nargs="+", default=[parse_tokens("128K")])
    parser.add_argument("--chunk-tokens", type=parse_tokens, default=parse_tokens("32K"))
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--checkpoints", default="attention")
    parser.add_argument("--full", action="store_true", help="train every weight, not LoRA")
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


def build(config: LlamaConfig, full: bool) -> PreTrainedModel:
    """The model on the GPU with random weights, made there: a CPU takes a minute for them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cuda")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    if full:
        return model.train()
    lora = LoraConfig(r=16, target_modules="all-linear")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def step_seconds(model: nn.Module, ids: torch.Tensor) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    model.zero_grad()
    assert torch.isfinite(loss), "the loss is not finite"
    return seconds


def strict_flops(config: LlamaConfig, n_tokens: int, full: bool) -> float:
    """Floating-point operations of a step that a model needs, none of them twice."""
    attention = 2 * config.hidden_size**2 * (1 + config.num_key_value_heads / config.num_attention_heads)
    weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    weights += config.vocab_size * config.hidden_size
    return n_tokens * ((6 if full else 4) * weights + 6 * config.num_hidden_layers * n_tokens * config.hidden_size)


def measure(options: argparse.Namespace, n_tokens: int) -> dict[str, Any]:
    config = LlamaConfig(num_hidden_layers=options.layers, **LLAMA_8B)
    model = build(config, options.full)
    plugin = FPDTPlugin(chunk_tokens=options.chunk_tokens, kernel=options.kernel, checkpoints=options.checkpoints)
    apply_fpdt(model, plugin)
    ids = torch.randint(0, config.vocab_size, (1, n_tokens), device="cuda")
    step_seconds(model, ids)
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step_seconds(model, ids) for _ in range(options.steps))
    mfu = strict_flops(config, n_tokens, options.full) / seconds / PEAK_FLOPS
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": seconds, "tokens_per_s": n_tokens / seconds, "mfu": mfu, "peak_gib": peak_gib}


def conditions() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    versions += f", accelerate {accelerate.__version__}, python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, bfloat16, {versions}, commit {commit or 'unknown'}, {date.today()}"


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hf_fpdt").setLevel(logging.INFO)
    options = parse()
    print(conditions())
    what = "full" if options.full else "LoRA r=16"
    print("| shape | tokens | chunk | checkpoints | kernel | step s | tokens/s | strict MFU | peak device GiB |")
    for n_tokens in options.seq_len:
        row = measure(options, n_tokens)
        print(
            f"| Llama-8B shape, {options.layers} layers, {what} | {n_tokens:,} | {options.chunk_tokens:,} | "
            f"{options.checkpoints} | {options.kernel} | {row['seconds']:.2f} | {row['tokens_per_s']:,.0f} | "
            f"{row['mfu']:.3f} | {row['peak_gib']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
