"""What it takes to try a model's layers, and that right ones pass: shapes, adapters and quantised weights on a GPU.

    python scripts/bench/trial_seconds.py            # on a CPU: tiny models, for a look at the script itself

For each case: seconds of `apply_fpdt` (the second of two, so that kernels are loaded), of them the trial's, how many
kinds of layers there were, and what a step spends on looking whether layers changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.layer_state import look_of
from hf_fpdt.model.layers import decoder_layers
from hf_fpdt.model.shapes import build_random, llama_8b, with_layers
from hf_fpdt.model.trial import try_layers

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def llama(n_layers: int) -> Any:
    config = with_layers(llama_8b(), n_layers if ON_GPU else 2)
    if not ON_GPU:
        config.hidden_size, config.intermediate_size, config.vocab_size = 256, 512, 1024
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 64
    return config


def experts(n_layers: int) -> Any:
    """Qwen3-30B-A3B's layers."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "vocab_size": 151_936}
    if not ON_GPU:
        sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 1024}
    count = 128 if ON_GPU else 8
    return Qwen3MoeConfig(
        **sizes, num_hidden_layers=n_layers, num_key_value_heads=4, head_dim=128, num_experts=count,
        num_experts_per_tok=min(8, count // 2), decoder_sparse_step=1, intermediate_size=6144,
    )  # fmt: skip


def adapted(model: Any, **config: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", **config))


def quantised(**how: Any) -> Any:
    """Two layers with weights in 4 or 8 bits, saved and loaded as users do."""
    with tempfile.TemporaryDirectory() as folder:
        build_random(llama(2), DEVICE, torch.bfloat16, False).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**how), dtype=torch.bfloat16, device_map={"": DEVICE}
        )


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def plain(config: Any) -> Any:
        return build_random(config, DEVICE, torch.bfloat16, False)

    yield "8B, all weights", lambda: plain(llama(32))
    yield "8B, LoRA", lambda: adapted(plain(llama(32)))
    yield "8B, DoRA", lambda: adapted(plain(llama(32)), use_dora=True)
    yield "30B-A3B, 8 layers, all weights", lambda: plain(experts(8))
    yield "30B-A3B, 8 layers, LoRA", lambda: adapted(plain(experts(8)))
    if importlib.util.find_spec("bitsandbytes") and ON_GPU:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        yield "8B, 2 layers, NF4, LoRA", lambda: adapted(quantised(**four))
        yield "8B, 2 layers, 8 bits, LoRA", lambda: adapted(quantised(load_in_8bit=True))


def clock() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_again(layer: torch.nn.Module) -> None:
    """Other weights for the layer that is tried."""
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.is_floating_point() and weight.dim() > 1:
                weight.normal_(std=0.02)


def measure(name: str, make: Callable[[], Any], draws: int) -> None:
    model = make()
    plugin = FPDTPlugin(chunk_tokens=4096)
    apply_fpdt(model, plugin).remove()
    torch.cuda.reset_peak_memory_stats() if ON_GPU else None
    held, began = torch.cuda.memory_allocated() if ON_GPU else 0, clock()
    handle = apply_fpdt(model, plugin)
    applied = clock() - began
    kinds = len(handle._settings.trials.passed)
    spent = []
    for _ in range(draws):  # routing differs by weights, and none may be refused
        draw_again(decoder_layers(handle.model)[0])
        handle._settings.trials.passed.clear()
        for layer in decoder_layers(handle.model):
            looks: Any = layer._fpdt_looks
            looks.clear()
        began = clock()
        try_layers(handle.model)
        spent.append(clock() - began)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if ON_GPU else 0.0
    layers = decoder_layers(handle.model)
    began = time.perf_counter()
    for layer in layers:
        look_of(layer)
    looks = time.perf_counter() - began
    print(
        f"{name:32} apply {applied:6.3f} s, trial {sorted(spent)[len(spent) // 2]:6.3f} s ({min(spent):.3f} to "
        f"{max(spent):.3f}), {kinds} kinds of {len(layers)} layers, {peak:5.2f} GiB more at the peak; "
        f"looks {looks * 1e3:5.2f} ms a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10, help="trials of each case (default: %(default)s)")
    draws = parser.parse_args().draws
    for name, make in cases():
        measure(name, make, draws)


if __name__ == "__main__":
    main()
