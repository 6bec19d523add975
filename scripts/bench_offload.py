"""What offloading costs and saves: training steps of one model shape under several budgets and checkpoint policies.

    python scripts/bench_offload.py --shape llama-8b --layers 4 --seq-len 128K --case device=0 --case device=auto
    python scripts/bench_offload.py --shape llama-8b --layers 32 --seq-len 512K --steps 1 --case checkpoints=auto

Each --case is one row: comma-separated device=GIB, host=GIB (device_budget_gib, host_budget_gib; "auto" or a number),
checkpoints=POLICY, disk=FOLDER. Random weights in bfloat16, LoRA rank 16 on every linear (or --full with AdamW in
bfloat16). A short step first compiles kernels; pinning host memory is timed apart. With --steps above 1 the first is
left out of the median. Strict MFU counts no recomputation and attention at half: tokens · (4·N + 6·L·S·heads·head_dim)
for LoRA (6·N in full) over 989 TFLOP/s. What is predicted is of `hf_fpdt.plan` and
`hf_fpdt.forecast`.
"""

import argparse
import gc
import json
import logging
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.bench.predicted import predicted
from hf_fpdt.commands.conditions import conditions_of
from hf_fpdt.config import parse_tokens
from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.model.shapes import SHAPES, build_random, with_layers
from hf_fpdt.plan.checkpointing import peak_bytes
from hf_fpdt.plan.operations import strict_flops
from hf_fpdt.units import GIB

PACKAGES = ("torch", "transformers", "peft")
PEAK_FLOPS = GPUS["h100"].peak


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b", help="random weights (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the shape to keep (%(default)s)")
    parser.add_argument(
        "--seq-len", type=parse_tokens, nargs="+", default=[parse_tokens("128K")], help="lengths (128K)"
    )
    parser.add_argument("--chunk-tokens", type=parse_tokens, default=parse_tokens("32K"), help="of a chunk (32K)")
    parser.add_argument("--kernel", default="auto", help="attention kernel (%(default)s)")
    parser.add_argument("--case", action="append", required=True, help="one row, e.g. device=0,checkpoints=attention")
    parser.add_argument("--together", action="store_true", help="a model for each case, all at once; steps take turns")
    parser.add_argument("--full", action="store_true", help="train every weight with AdamW, not LoRA")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each case (%(default)s)")
    parser.add_argument("--out", type=Path, help="append one JSON object a row to this file")
    return parser.parse_args()


def plugin_of(case: str, options: argparse.Namespace) -> FPDTPlugin:
    names = {
        "device": "device_budget_gib",
        "host": "host_budget_gib",
        "checkpoints": "checkpoints",
        "disk": "disk_dir",
    }
    settings: dict[str, Any] = {}
    for part in filter(None, case.split(",")):
        key, _, value = part.partition("=")
        is_number = key in ("device", "host") and value != "auto"
        settings[names.get(key, key)] = float(value) if is_number else value
    return FPDTPlugin(chunk_tokens=options.chunk_tokens, kernel=options.kernel, **settings)


def step(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds, loss) of forward, backward and optimizer."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not torch.isfinite(loss):
        raise RuntimeError(f"a step's loss is {loss.item()}; its time says nothing. Report the case and the model.")
    return seconds, loss.item()


class Case:
    """One model with FPDT under one case's settings, and what its steps took.

    Cases of one run take turns, step by step: a GPU's clock falls as it warms, by more than what is compared here.
    """

    def __init__(self, case: str, config: Any, options: argparse.Namespace) -> None:
        self.case, self.config, self.options = case, config, options
        torch.manual_seed(0)
        self.model = build_random(config, "cuda", torch.bfloat16, lora=not options.full)
        self.handle = apply_fpdt(self.model, plugin_of(case, options))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.begin()

    def begin(self) -> None:
        """Forget what was measured: another length follows."""
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = self.weight_bytes = 0

    def step(self, n_tokens: int, *, count: bool = True) -> None:
        ids = torch.randint(0, self.config.vocab_size, (1, n_tokens), device="cuda")
        pinned, before = self.handle.store.pinning_seconds, torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        took, loss = step(self.model, ids, self.optimizer)
        if count:
            self.seconds.append(took - (self.handle.store.pinning_seconds - pinned))
            self.losses.append(loss)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
            self.weight_bytes = before

    def row(self, n_tokens: int) -> dict[str, Any]:
        full = self.options.full
        sizes, plan = self._plan(n_tokens)
        median = statistics.median(self.seconds[1:] or self.seconds)
        flops = strict_flops(sizes.model, sizes.vocabulary, n_tokens, full=full)
        return {
            "case": self.case,
            "tokens": n_tokens,
            "seconds": round(median, 3),
            "all_seconds": [round(s, 3) for s in self.seconds],
            "tokens_per_s": round(n_tokens / median),
            "strict_mfu": round(flops / median / PEAK_FLOPS, 4),
            "loss": round(self.losses[-1], 4),
            "allocated_before_gib": round(self.weight_bytes / GIB, 3),
            "peak_device_gib": round(self.peak_bytes / GIB, 3),
            "checkpoints_device_gib": round(plan.forecast.device_bytes / GIB, 3),
            "host_gib": round(self.handle.store.used_bytes()["pinned"] / GIB, 3),
            **{key: round(value, 3) for key, value in self._predicted(n_tokens).items()},
            "store_gib": round(peak_bytes(plan.kept, sizes.layer_bytes()) / GIB, 3),
            "disk_gib": round(plan.forecast.disk_bytes / GIB, 3),
            "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "pinning_seconds": round(self.handle.store.pinning_seconds, 1),
            "kept": str(plan.kept),
            "attention_reruns": plan.kept.attention_reruns,
            "rebuilt": plan.kept.rebuilt,
            "resident_chunks": plan.kv.backward_resident,
            "budgets_gib": [self.handle.plugin.device_budget_gib, self.handle.plugin.host_budget_gib],
        }

    def _predicted(self, n_tokens: int) -> dict[str, float]:
        return predicted(self.handle, self.model, n_tokens, torch.cuda.get_device_name())

    def _plan(self, n_tokens: int) -> tuple[Any, Any]:
        plans = self.handle.store.plans.items()
        return next((sizes, plan) for (sizes, _), plan in plans if sizes.plan.n_tokens == n_tokens)


def run_together(cases: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of cases whose steps take turns."""
    config = with_layers(SHAPES[options.shape](), options.layers)
    made = [Case(case, config, options) for case in cases]
    for case in made:
        case.step(2 * options.chunk_tokens + 1, count=False)  # kernels compile
    for n_tokens in options.seq_len:
        for case in made:
            case.begin()
        for number in range(options.steps):
            for case in made:
                case.step(n_tokens)
                print(f"{n_tokens:,} tokens, step {number} of {case.case}: {case.seconds[-1]:.2f} s", flush=True)
        yield from (case.row(n_tokens) for case in made)
    for case in made:
        case.handle.remove()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        **conditions_of(PACKAGES),
        "shape": options.shape,
        "layers": options.layers,
        "trained": "full, AdamW bf16" if options.full else "LoRA r=16",
        "chunk_tokens": options.chunk_tokens,
    }


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_fpdt").setLevel(logging.INFO)
    options = parse()
    facts = conditions(options)
    print(facts, flush=True)
    for cases in [options.case] if options.together else [[case] for case in options.case]:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            for row in run_together(cases, options):
                write(facts | row, options.out)
        except (torch.OutOfMemoryError, MemoryError) as error:
            write(facts | {"case": cases, "error": " ".join(str(error).split())[:400]}, options.out)


def write(row: dict[str, Any], path: Path | None) -> None:
    print(row, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
