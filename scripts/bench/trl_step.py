"""TRL's own trainers on very long rows: seconds and memory of a step with FPDT, and how far they go without it.

    python scripts/bench/trl_step.py --loss dpo --seq-len 128K --plain 64K 80K 96K --out out/dpo.json
    python scripts/bench/trl_step.py --loss sft --seq-len 128K --steps 2 --out out/sft.json
    python scripts/bench/trl_step.py --loss grpo --seq-len 256K --out out/grpo.json

dpo: DPOTrainer with FPDTTrainerMixin on a pair, a short prompt and two answers of --seq-len tokens each; the reference
is the model without its adapter. sft: FPDTTrainer, then SFTTrainer with the mixin, on the same model and rows. grpo:
GRPOTrainer with the mixin; nothing is generated: its own functions score one completion, of --seq-len tokens with its
prompt, by the old policy and by the reference, then make its loss and gradients. A score's loss is its mean.

--plain: then the same trainer without the mixin, as TRL sets it up (SDPA, gradient checkpointing), on rising lengths
until the first that the GPU has no memory for; --offload lets TRL keep its checkpoints on the host there.

Weights are random, and so are ids. LoRA r=16 on every linear, AdamW, bfloat16 weights under autocast (TRL's default;
adapters that TRL makes are fp32, sft's are bfloat16). A short step before the long ones compiles kernels. Seconds are
of forward, backward and optimizer, by the host's clock, the device waited for at both ends; those that pinned host
memory are also said alone. Each row is written down as it comes. FPDT's settings: FPDT_* variables.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from hf_fpdt import FPDTPlugin, FPDTTrainer, FPDTTrainerMixin
from hf_fpdt.commands.conditions import conditions_of
from hf_fpdt.commands.options import config_of, count, tokens
from hf_fpdt.config import resolve_chunk_tokens
from hf_fpdt.model.shapes import LORA_RANK, SHAPES, build_random
from hf_fpdt.units import GIB

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PROMPT = 64  # tokens
# Of a short step beyond a chunk: what later chunks need of earlier ones is compiled too.
BEYOND = 4096
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "triton", "flash-attn-4", "liger-kernel")
OFTEN: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not ON_GPU,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DPO": {"max_length": None},
    "SFT": {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
    "GRPO": {"num_generations": 2, "per_device_train_batch_size": 2, "num_iterations": 2, "beta": 0.04},
}
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", type=str.upper, choices=list(SETTINGS), required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b", help="(default: %(default)s)")
    parser.add_argument("--model", help="in its place a folder's configuration; weights are random too")
    parser.add_argument("--layers", type=count, help="layers to keep")
    parser.add_argument("--seq-len", type=tokens, default=tokens("128K"), help="tokens (default: 128K)")
    parser.add_argument("--steps", type=int, default=1, help="long steps; 0: --plain alone (default: %(default)s)")
    parser.add_argument("--warm", type=tokens, help="tokens of the short step (default: a chunk and a bit)")
    parser.add_argument("--plain", type=tokens, nargs="*", default=[], help="lengths without the mixin")
    parser.add_argument("--offload", action="store_true", help="without the mixin, TRL's activation_offloading")
    parser.add_argument("--no-autocast", action="store_true", help="bfloat16 adapters, and no autocast")
    parser.add_argument("--forward-only", action="store_true", help="grpo: scores, no gradients")
    parser.add_argument("--out", type=Path, help="file of JSON for what was measured")
    return parser.parse_args()


class Clock(TrainerCallback):
    """Seconds and the peak of memory of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if ON_GPU else 0.0
        self.rows.append({"seconds": time.perf_counter() - self.began, "device_peak_gib": peak})


class InOrder:
    """Rows are ids already, and come as they are: text of this length takes a tokenizer longer than a step."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if dataset is None else dataset)  # type: ignore[attr-defined]


class OrderedFPDT(InOrder, FPDTTrainer):
    """FPDTTrainer, likewise."""


def rows_of(loss: str, lengths: Sequence[int], vocabulary: int) -> Dataset:
    """Ids below 3 are the tokenizer's own."""
    names = {"DPO": ("prompt_ids", "chosen_ids", "rejected_ids"), "SFT": ("input_ids",), "GRPO": ()}[loss]
    rows: list[Row] = [
        {name: torch.randint(3, vocabulary, (PROMPT if name == "prompt_ids" else n,)).tolist() for name in names}
        for n in lengths
    ]
    if loss == "SFT":
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    return Dataset.from_list(rows if names else [{"prompt": "a"}])


def trainer_of(options: argparse.Namespace, model: Any, folder: str, plugin: FPDTPlugin | None) -> Any:
    """TRL's trainer of the model, with the mixin or, where there is no plugin, as TRL has it."""
    loss = options.loss
    more: dict[str, Any] = {} if plugin is None else {"fpdt_plugin": plugin}
    settings: dict[str, Any] = {**OFTEN, **SETTINGS[loss], "bf16": not options.no_autocast}
    if loss == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    else:
        settings["activation_offloading"] = options.offload and plugin is None and ON_GPU
    if loss != "SFT":
        more["peft_config"] = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    made = (InOrder, *(() if plugin is None else (FPDTTrainerMixin,)), getattr(trl, f"{loss}Trainer"))
    trainer = type(f"{loss}OfIds", made, {})(
        model=model,
        args=getattr(trl, f"{loss}Config")(folder, **settings),
        train_dataset=rows_of(loss, [4], 9),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
        **more,
    )
    for parameter in trainer.model.parameters() if options.no_autocast else ():
        parameter.data = parameter.data.to(torch.bfloat16)
    if loss == "GRPO":  # which is not trained by Trainer's loop here, that does this
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def steps_of(trainer: Any, loss: str, lengths: Sequence[int]) -> list[Row]:
    """Of an optimizer step each; losses are those of the log."""
    trainer.train_dataset = rows_of(loss, lengths, trainer.model.config.get_text_config().vocab_size)
    trainer.args.max_steps = len(lengths)
    clock = Clock()
    trainer.add_callback(clock)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(clock)
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    return [{"tokens": n, **row, "loss": loss} for n, row, loss in zip(lengths, clock.rows, losses, strict=True)]


def scores_of(trainer: Any, n_tokens: int, forward_only: bool) -> list[Row]:
    """GRPO's passes over a prompt with its completion, as its step calls them."""
    ids = torch.randint(3, trainer.model.config.get_text_config().vocab_size, (1, n_tokens), device=DEVICE)
    mask, kept, clock = torch.ones_like(ids), n_tokens - PROMPT, Clock()
    trainer.current_gradient_accumulation_steps = 1  # Trainer says it in its loop
    inputs: dict[str, Tensor] = {"prompt_ids": ids[:, :PROMPT], "prompt_mask": mask[:, :PROMPT]}
    inputs |= {"completion_ids": ids[:, PROMPT:], "completion_mask": mask[:, PROMPT:]}
    inputs |= {"advantages": torch.ones(1, device=DEVICE), "num_items_in_batch": torch.tensor(kept, device=DEVICE)}

    def timed(what: str, run: Callable[[], Tensor]) -> Tensor:
        clock.on_step_begin()
        value = run().detach()
        clock.on_step_end()
        clock.rows[-1] |= {"tokens": n_tokens, "what": what, "loss": float(value.double().mean())}
        return value

    def score() -> Tensor:
        found: Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, batch_size=1)[0]
        return found

    def train() -> Tensor:
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)
        return loss

    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        inputs["old_per_token_logps"] = timed("old policy", score)
        with use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None):
            inputs["ref_per_token_logps"] = timed("reference", score)
    if not forward_only:
        timed("loss and gradients", train)
        trainer.model.zero_grad()
    return clock.rows


class Record:
    """What is measured, said and written down as it comes."""

    def __init__(self, options: argparse.Namespace, plugin: FPDTPlugin) -> None:
        self.options = options
        gpu = torch.cuda.get_device_name() if ON_GPU else "CPU"
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        conditions = {"command": " ".join(sys.argv), "gpu": gpu, **conditions_of(PACKAGES)}
        self.result: dict[str, Any] = {**conditions, "options": asked, "settings": asdict(plugin), "rows": []}
        print(json.dumps(self.result, indent=1), flush=True)

    def measure(self, trainer: Any, who: str, lengths: Sequence[int], *, short: bool = True) -> list[Row]:
        """Rows of these lengths.

        Args:
            short: the first one compiles kernels for the others.
        """
        options, loss = self.options, self.options.loss
        try:
            if loss == "GRPO":
                rows = [row for n in lengths for row in scores_of(trainer, n, options.forward_only)]
            else:
                rows = steps_of(trainer, loss, lengths)
        except torch.OutOfMemoryError as error:
            rows = [{"tokens": lengths[-1], "out_of_memory": str(error).splitlines()[0]}]
        for place, row in enumerate(rows):
            row |= {"who": who, "short": short and place < len(rows) // len(lengths)}
            row |= {"finite": math.isfinite(row.get("loss", 0.0))}
            print(text_of(row), flush=True)
        self.result["rows"] += rows
        self.write()
        return rows

    def write(self) -> None:
        if (out := self.options.out) is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")


def text_of(row: Row) -> str:
    start = f"{row['who']:11} {row['tokens']:9,} tokens"
    if "out_of_memory" in row:
        return f"{start}: out of GPU memory"
    notes = [*([row["what"]] if "what" in row else []), *(["short"] if row["short"] else [])]
    notes += [] if row["finite"] else ["NOT FINITE"]
    seconds, peak = f"{row['seconds']:8.2f} s", f"peak {row['device_peak_gib']:6.2f} GiB"
    return ", ".join((f"{start}: {seconds}", peak, f"loss {row['loss']:.4f}", *notes))


def new_model(options: argparse.Namespace) -> Any:
    """With adapters where TRL is not to make them; memory that nothing refers to any more is given back before."""
    give_back()
    torch.manual_seed(0)
    return build_random(config_of(options, layers=options.layers), DEVICE, torch.bfloat16, lora=options.loss == "SFT")


def give_back() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def with_fpdt(record: Record, trainer: Any, who: str) -> float:
    """Seconds of the fastest long step or score, without pinning; FPDT is taken off the model."""
    options, store = record.options, trainer.fpdt_handle.store
    warm = options.warm or min(options.seq_len, resolve_chunk_tokens(trainer.fpdt_plugin, on_gpu=ON_GPU) + BEYOND)
    rows = record.measure(trainer, who, [warm, *[options.seq_len] * options.steps])
    pinning, pinned = store.pinning_seconds, store.used_bytes()["pinned"] / GIB
    print(f"{who:11} pinned {pinned:.1f} GiB of the host in {pinning:.1f} s of these")
    record.result[who] = {"pinning_seconds": pinning, "pinned_gib": pinned}
    trainer.fpdt_handle.remove()
    first, *others = [row["seconds"] for row in rows if "seconds" in row and not row["short"]] or [math.nan]
    return float(min([first - pinning, *others]))


def compare(record: Record, plugin: FPDTPlugin, folder: str) -> None:
    """TRL's trainer with the mixin; for sft FPDTTrainer before it."""
    options, own = record.options, math.nan
    model = new_model(options)
    if options.loss == "SFT":
        arguments = TrainingArguments(folder, **OFTEN, bf16=not options.no_autocast)
        rows = rows_of("SFT", [4], 9)
        trainer: Any = OrderedFPDT(model=model, args=arguments, train_dataset=rows, fpdt_plugin=plugin)
        own = with_fpdt(record, trainer, "FPDTTrainer")
        del trainer
        give_back()
    seconds = with_fpdt(record, trainer_of(options, model, folder, plugin), "the mixin")
    if options.loss == "SFT":
        record.result["ratio"] = seconds / own
        print(f"SFTTrainer with the mixin takes {seconds / own:.4f} of FPDTTrainer's seconds")


def until_full(record: Record, folder: str) -> None:
    """TRL alone on rising lengths, until the GPU has no memory for one."""
    options = record.options
    trainer, longest = trainer_of(options, new_model(options), folder, None), 0
    lengths = sorted(options.plain)
    for place, length in enumerate((options.warm or min(2048, lengths[0]), *lengths)):
        rows = record.measure(trainer, "TRL alone", [length], short=place == 0)
        if "out_of_memory" in rows[-1]:
            break
        longest = length
        trainer.model.zero_grad()
        give_back()
    record.result["longest_plain"] = longest
    print(f"TRL alone: {longest:,} tokens were the longest of those tried")


def main() -> None:
    options, plugin = parse(), FPDTPlugin()
    record = Record(options, plugin)
    with tempfile.TemporaryDirectory() as folder:
        if options.steps:
            compare(record, plugin, folder)
        if options.plain:
            until_full(record, folder)
    record.write()


if __name__ == "__main__":
    main()
