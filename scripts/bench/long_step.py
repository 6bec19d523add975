"""One training step on one very long sequence of real text, through FPDTTrainer: predicted, run, and written down.

    accelerate launch scripts/bench/long_step.py --shape llama-8b --seq-len 768K --out out/768k.json
    accelerate launch scripts/bench/long_step.py --model meta-llama/Llama-3.1-8B --text book.txt --seq-len 768K
    accelerate launch --num_processes 2 scripts/bench/long_step.py --shape llama-8b --seq-len 1M
    python scripts/bench/long_step.py --shape llama-8b --gpu-mem 24 --host-mem 64 --longest

All processes share the sequence (Ulysses). LoRA r=16 on every linear, or --full (with an FSDP2 configuration of
accelerate on several GPUs); bfloat16, AdamW. A shape has random weights and reads text as bytes, a model its own
weights and tokenizer. Text is the given files, or the sources of Python's standard library. A short step before the
long one compiles kernels. FPDT's settings are those of FPDT_* variables: FPDT_HOST_BUDGET_GIB=112 ...

What is predicted comes from the configuration alone, before the weights are there. --plan-only ends there; a sequence
that cannot fit is refused there. Without a GPU nothing is predicted: `hf-fpdt plan` needs none.

--gpu-mem is a smaller card, as sold: the rest of each GPU is held until the end, and neither plan nor step has it.
--host-mem is a smaller machine's. --longest takes the longest sequence that the planner finds for them. At the end
stands what was planned beside what was measured. Without a GPU the plan with --gpu-mem is an H100's, nothing is held.
"""

import argparse
import json
import logging
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_fpdt import FPDTPlugin, FPDTTrainer
from hf_fpdt.commands.bench.predicted import predicted
from hf_fpdt.commands.conditions import conditions_of
from hf_fpdt.commands.options import amount, config_of, count, tokens
from hf_fpdt.commands.plan.tables import as_json
from hf_fpdt.config import resolve_chunk_tokens
from hf_fpdt.forecast.fit import HOST_USABLE, Machines, Training, fit, machine_bytes
from hf_fpdt.forecast.rates import GPUS, gpu_named, with_memory
from hf_fpdt.forecast.searches import longest
from hf_fpdt.model.shapes import LORA_RANK, SHAPES, build_random, training_of, with_lora
from hf_fpdt.plan.placement import HOST_RESERVE
from hf_fpdt.units import GIB

# What half a step has of a step's log: no speed, no gradients.
FORWARD_FIGURES = ("step", "loss", "step_seconds", "device_peak_gib", "host_gib")
# Of an H100's 80 its driver shows 79.1.
NOT_SHOWN_GIB = 0.9
PACKAGES = ("torch", "transformers", "accelerate", "peft", "flash-attn-4", "liger-kernel")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape", choices=list(SHAPES), default="llama-8b", help="random weights (default: %(default)s)"
    )
    what.add_argument("--model", help="hub name or folder")
    parser.add_argument("--random", action="store_true", help="random weights and bytes for --model too")
    parser.add_argument("--layers", type=count, help="layers of a shape to keep")
    parser.add_argument("--full", action="store_true", help="train every weight")
    parser.add_argument("--seq-len", type=tokens, default=tokens("128K"), help="tokens (default: 128K)")
    parser.add_argument("--steps", type=count, default=1, help="long steps (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", help="files (default: Python's standard library)")
    parser.add_argument(
        "--forward-only", action="store_true", help="no backward pass: all that a step keeps for it is there then"
    )
    parser.add_argument(
        "--plan-only", action="store_true", help="say what is predicted, and end (on the GPUs to be used)"
    )
    parser.add_argument("--gpu-mem", type=amount, metavar="GB", help="of each GPU, as sold (default: its own)")
    parser.add_argument("--host-mem", type=amount, metavar="GIB", help="of the machine (default: FPDT's own choice)")
    parser.add_argument("--longest", action="store_true", help="the longest sequence that is planned, not --seq-len")
    parser.add_argument("--out", type=Path, help="file of JSON for what was predicted and measured")
    return parser.parse_args()


class Text(Dataset[dict[str, Tensor]]):
    """A short sequence, then long ones, each another part of the text."""

    def __init__(self, ids: Tensor, lengths: Sequence[int]) -> None:
        self._ids, self._lengths = ids, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = sum(self._lengths[:index])
        ids = self._ids[start : start + self._lengths[index]]
        return {"input_ids": ids, "labels": ids}


class InOrder(FPDTTrainer):
    """The short sequence is the first.

    Attributes:
        forward_only: whether the long ones go forward alone.
    """

    forward_only = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As FPDTTrainer's, or its forward half."""
        if not self.forward_only or self.state.global_step == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        return loss.detach()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def read_ids(options: argparse.Namespace, n_tokens: int) -> Tensor:
    """So many ids of text: the tokenizer's, or bytes."""
    files = options.text or sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    tokenizer = None if options.model is None or options.random else AutoTokenizer.from_pretrained(options.model)
    ids: list[int] = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids += list(text.encode()) if tokenizer is None else tokenizer(text).input_ids
        if len(ids) >= n_tokens:
            return torch.tensor(ids[:n_tokens])
    sys.exit(f"error: {n_tokens:,} tokens are wanted and the text has {len(ids):,}; give more files to --text.")


def planned_on(
    config: Any, options: argparse.Namespace, plugin: FPDTPlugin, gpu_name: str
) -> tuple[Training, Machines] | None:
    """What the planner is asked; None where the kind of GPU is not known."""
    gpu, gpus, budget, kept = gpu_named(gpu_name), plugin.sp_size, plugin.host_budget_gib, plugin.device_budget_gib
    if gpu is None and options.gpu_mem is not None:
        gpu = GPUS["h100"]
    if gpu is None:
        return None
    there = psutil.virtual_memory().total
    machines = Machines(
        gpu=gpu if options.gpu_mem is None else with_memory(gpu, options.gpu_mem),
        gpus=gpus,
        host_bytes=there if budget == "auto" else machine_bytes(int(budget * GIB) * gpus),
        sharded=os.environ.get("ACCELERATE_USE_FSDP", "false") == "true",
        kept_bytes=None if kept == "auto" else int(kept * GIB),
    )
    training = replace(
        training_of(config, lora=not options.full),
        chunk_tokens=resolve_chunk_tokens(plugin, on_gpu=True),
        checkpoints=plugin.checkpoints,
        auto_chunk=plugin.chunk_tokens == "auto",
    )
    return training, machines


def predict(config: Any, options: argparse.Namespace, plugin: FPDTPlugin, gpu_name: str) -> dict[str, Any]:
    """What `hf-fpdt plan` says of the long step; nothing where the kind of GPU is not known.

    Raises:
        SystemExit: it does not fit.
    """
    asked = planned_on(config, options, plugin, gpu_name)
    if asked is None:
        if options.longest:
            sys.exit(f"error: --longest: the rates of {gpu_name} are not known; give --seq-len.")
        return {}
    try:
        found = longest(*asked) if options.longest else fit(*asked, options.seq_len)
    except MemoryError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if found is None:
        sys.exit("error: --longest: no sequence fits; see `hf-fpdt plan --seq-len 16K` for the arithmetic.")
    return {**as_json(found, {}), "device_budget_bytes": found.plan.budgets.device}


def hold(sold_gib: float) -> Tensor:
    """What this process's GPU has beyond a card that is sold with so much, taken away while the tensor lives.

    The context, and kernels as they are loaded, then take their share of the smaller card, as they would there.
    """
    free, total = torch.cuda.mem_get_info()
    beyond = total - int((sold_gib - NOT_SHOWN_GIB) * GIB)
    if not 0 <= beyond <= free:
        sys.exit(f"error: --gpu-mem: this GPU has {total / GIB:.1f} GiB, {free / GIB:.1f} of them free; take less.")
    return torch.empty(beyond, dtype=torch.uint8, device="cuda")


def build(config: Any, options: argparse.Namespace) -> nn.Module:
    """On this process's device, in bfloat16, adapters around it unless every weight trains."""
    torch.manual_seed(0)
    device = PartialState().device
    if options.model is None or options.random:
        return build_random(config, device, torch.bfloat16, lora=not options.full)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.bfloat16).to(device)
    return (model if options.full else with_lora(model)).train()


def train(
    model: nn.Module, ids: Tensor, lengths: Sequence[int], plugin: FPDTPlugin, folder: str, forward_only: bool
) -> InOrder:
    """Steps of those lengths, or of all but the first the forward pass."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=len(lengths),
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=Text(ids, lengths), fpdt_plugin=plugin)
    trainer.forward_only = forward_only
    trainer.train()
    return trainer


def measured(trainer: InOrder, n_tokens: int, gpu_name: str, held_gib: float = 0.0) -> dict[str, Any]:
    """Of the long steps; what this process pinned, and how long that took, is in the first one's seconds.

    Args:
        held_gib: memory of the GPU that is no part of what a step takes.
    """
    store = trainer.fpdt_handle.store
    # FSDP2's shards are predicted by `predict` alone.
    by_plan = {} if trainer.is_fsdp_enabled else predicted(trainer.fpdt_handle, trainer.model, n_tokens, gpu_name)
    logs = [log for log in trainer.state.log_history if "loss" in log][1:]
    logs = [{**log, **_without(log, held_gib)} for log in logs]
    step, plan = min(
        ((step, plan) for (step, _), plan in store.plans.items()),
        key=lambda each: abs(each[0].plan.n_tokens - n_tokens),
    )
    if trainer.forward_only:
        logs = [{name: log[name] for name in FORWARD_FIGURES if name in log} for log in logs]
    return {
        "steps": logs,
        "pinning_seconds": store.pinning_seconds,
        "pinned_gib": store.used_bytes()["pinned"] / GIB,
        "held_gib": held_gib,
        "chunk_tokens": step.plan.chunk_tokens,
        # A CPU has no limit.
        "device_budget_gib": plan.budgets.device / GIB if torch.cuda.is_available() else None,
        **by_plan,
    }


def _without(log: dict[str, Any], held_gib: float) -> dict[str, float]:
    name = "device_peak_gib"
    return {name: log[name] - held_gib} if name in log else {}


def side_by_side(foretold: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What was planned beside what was measured in the last long step, a line each; a GPU's part needs a GPU."""
    last = found["steps"][-1]
    rows = (
        ("seconds", foretold["seconds"], last.get("step_seconds")),
        ("GiB of the GPU at the peak", foretold["peak_device_bytes"] / GIB, last.get("device_peak_gib")),
        ("GiB of it for K, V, checkpoints", foretold["device_budget_bytes"] / GIB, found["device_budget_gib"]),
        ("GiB of the host, pinned", foretold["host_bytes"] / GIB, found["pinned_gib"]),
        ("tokens a chunk", foretold["chunk_tokens"], found["chunk_tokens"]),
    )
    lines = [
        f"{foretold['tokens']:,} tokens, {found['held_gib']:.1f} GiB held",
        f"{'':32} {'planned':>10} {'measured':>10}",
    ]
    for what, planned, seen in rows:
        lines.append(f"{what:32} {planned:10,.1f} " + (f"{seen:10,.1f}" if seen is not None else f"{'-':>10}"))
    return lines


def conditions(options: argparse.Namespace, plugin: FPDTPlugin, gpu_name: str) -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "model": options.model or options.shape,
        "layers": options.layers,
        "trained": "every weight" if options.full else f"LoRA r={LORA_RANK}",
        "dtype": "bfloat16",
        "tokens": options.seq_len,
        "settings": asdict(plugin),
        "gpus": f"{PartialState().num_processes} x {gpu_name}",
        **conditions_of(PACKAGES),
    }


def main() -> None:
    options, state = parse(), PartialState()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_fpdt").setLevel(logging.INFO if state.is_main_process else logging.WARNING)
    more: dict[str, Any] = {}
    if options.host_mem is not None:
        pinned = int(options.host_mem * GIB * HOST_USABLE) - HOST_RESERVE
        more = {"host_budget_gib": max(0, pinned) / GIB / state.num_processes}
    try:
        plugin = FPDTPlugin(sp_size=state.num_processes, progress=True, **more)
    except ValueError as error:
        sys.exit(f"error: {error}")
    gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    config = config_of(options, layers=options.layers)
    foretold = predict(config, options, plugin, gpu_name)
    if options.longest:
        options.seq_len = foretold["tokens"]
    result: dict[str, Any] = {**conditions(options, plugin, gpu_name), "foretold": foretold}
    state.print(json.dumps(result, indent=1))
    if not options.plan_only:
        result["measured"] = run(config, options, plugin, gpu_name)
        state.print(json.dumps(result["measured"], indent=1))
        if foretold:
            state.print(*side_by_side(foretold, result["measured"]), sep="\n")
    if options.out is not None and state.is_main_process:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(config: Any, options: argparse.Namespace, plugin: FPDTPlugin, gpu_name: str) -> dict[str, Any]:
    """A short step and the long ones, and what was measured of these."""
    on_gpu, held = torch.cuda.is_available(), None
    if options.gpu_mem is not None and on_gpu:
        held = hold(options.gpu_mem)
    # Two chunks and a bit: what follows finds every kernel compiled.
    short = min(options.seq_len, 2 * resolve_chunk_tokens(plugin, on_gpu=on_gpu) + 64)
    lengths = [short, *[options.seq_len] * options.steps]
    ids = read_ids(options, sum(lengths))
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(build(config, options), ids, lengths, plugin, folder, options.forward_only)
    found = measured(trainer, options.seq_len, gpu_name, 0.0 if held is None else held.numel() / GIB)
    trainer.accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
