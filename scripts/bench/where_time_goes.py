"""Where the time of a step goes: kernels of the GPU by kind, and how long it waits for the host.

    python scripts/bench/where_time_goes.py --shape llama-8b --layers 4 --seq-len 16K 32K 64K
    python scripts/bench/where_time_goes.py --shape llama-8b --layers 4 --seq-len 256K --documents lognormal:262,1
    python scripts/bench/where_time_goes.py --shape olmo3-7b --layers 4 --seq-len 128K --out out/

Random weights in bfloat16, LoRA of rank 16 on every linear, or --full. Each length is stepped twice, then three times
for its seconds (the median), then once under a profiler: "idle" is the share of that median in which the GPU ran no
kernel. --out is a folder for the kernels of each length. FPDT's settings are those of FPDT_* variables. Without a GPU
everything runs on tiny sizes, for a look at the script.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.bench.models import without_first_tokens
from hf_fpdt.commands.conditions import conditions_of
from hf_fpdt.commands.options import corpus_of, count, tokens
from hf_fpdt.model.shapes import SHAPES, build_random, with_layers
from hf_fpdt.parallel import positions_of
from hf_fpdt.units import GIB

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PACKAGES = ("torch", "transformers", "peft", "flash-attn-4", "liger-kernel", "flash-linear-attention")
KINDS = (
    ("attention", r"flash|fmha|cudnn.*sdpa|efficient_attention|cutlass_kernel_flash|Attention"),
    ("scans", r"gated_delta|chunk_|kda|recompute_w_u|solve_tril|ssd|_state_passing|causal_conv|conv"),
    ("grouped products", r"GemmUniversal|grouped|Grouped|cutlass.*gemm"),
    ("other products", r"nvjet|gemm|gemv|splitK|cublas"),
    ("rows of experts", r"_gather_row|_sum_rows|_gate_row|_add_rows"),
    ("loss", r"cross_entropy"),
    ("norms", r"_norm_"),
    ("gates", r"_swiglu|_geglu"),
    ("rotation", r"_triton_rope"),
    ("index, sort", r"index|gather|scatter|sort|Sort|cub|radix|arange|histogram"),
    ("reductions", r"reduce"),
    ("copies, casts", r"[Cc]opy|Memcpy|Memset"),
    ("elementwise", r"elementwise"),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=count, default=4, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=tokens, nargs="+", default=[tokens("32K")], help="(default: 32K)")
    parser.add_argument("--documents", type=corpus_of, help="what a row is packed of, as hf-fpdt bench takes it")
    parser.add_argument("--full", action="store_true", help="train every weight")
    parser.add_argument("--quantize", choices=("nf4", "int8"), help="linears under the adapters")
    parser.add_argument("--out", type=Path, help="folder for kernels")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> Any:
    config = with_layers(SHAPES[options.shape](), options.layers)
    if not ON_GPU:
        config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 256
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    return config


def stepper(model: Any, n_tokens: int, options: argparse.Namespace) -> Callable[[], None]:
    """A step on one row of random tokens; forward and backward, without an optimizer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, n_tokens), device=DEVICE, generator=generator)
    packed = {}
    if options.documents is not None:
        packed = {"position_ids": positions_of(options.documents.row(n_tokens), DEVICE)[None]}
    labels = without_first_tokens(ids, packed)

    def step() -> None:
        model(input_ids=ids, labels=labels, **packed).loss.backward()
        model.zero_grad()

    return step


def seconds_of(run: Callable[[], object], repeats: int = 3) -> float:
    """Of the median call, the device waited for."""
    took = []
    for _ in range(repeats):
        finish()
        began = time.perf_counter()
        run()
        finish()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def finish() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def profiled(step: Callable[[], None]) -> tuple[dict[str, float], Counter[str], float]:
    """Milliseconds and calls by kernel, the longest first, and milliseconds in which any ran, as they may overlap."""
    activities = [torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        finish()
    kernels: dict[str, float] = {}
    calls, spans = Counter[str](), []
    for event in recorded.events():
        if ON_GPU and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        start, end = event.time_range.start, event.time_range.end
        kernels[event.name] = kernels.get(event.name, 0.0) + (end - start) / 1e3
        calls[event.name] += 1
        spans.append((start, end))
    return longest_first(kernels), calls, union(spans) / 1e3


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the spans cover."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by kind, the longest first."""
    kinds: dict[str, float] = {}
    for kernel, milliseconds in kernels.items():
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    return longest_first(kinds)


def longest_first(named: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(named.items(), key=lambda each: -each[1]))


def measure(model: Any, n_tokens: int, options: argparse.Namespace) -> None:
    step = stepper(model, n_tokens, options)
    step()
    step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    wall_ms = seconds_of(step) * 1e3
    peak = torch.cuda.max_memory_allocated() / GIB if ON_GPU else 0.0
    kernels, calls, busy_ms = profiled(step)
    lines = [f"{wall_ms:10.1f} ms a step, a kernel runs for {busy_ms:.1f}"]
    lines += [f"{ms:10.1f} {calls[kernel]:6d} {kernel[:160]}" for kernel, ms in list(kernels.items())[:70]]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"kernels-{options.shape}-{n_tokens}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in by_kind(kernels).items())
    # A CPU's profiler slows it, and there is nobody who waits for it.
    on_gpu = f", idle {1 - busy_ms / wall_ms:.1%}, peak {peak:.1f} GiB" if ON_GPU else ""
    print(f"{n_tokens:,} tokens: {wall_ms:.1f} ms{on_gpu}; {kinds}")


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = build_random(config_of(options), DEVICE, dtype, not options.full, options.quantize)
    gpu = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"{options.shape}, {options.layers} layers, {gpu}, {conditions_of(PACKAGES)}")
    print(apply_fpdt(model, FPDTPlugin()))
    for n_tokens in options.seq_len:
        measure(model, n_tokens, options)


if __name__ == "__main__":
    main()
