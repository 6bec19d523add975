"""Fine-tune a Hugging Face causal language model on long texts: LoRA or full, with transformers' Trainer and hf_fpdt.

    python scripts/finetune.py --model meta-llama/Llama-3.1-8B --data books/ --max-length 512K --output out/books

Writes to --output: the adapter or the model with its tokenizer, README.md (the model card), loss_by_position.png and
.csv (held-out loss at each position, before and after), run.json (arguments, versions, hardware, timing).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from base_model import (
    check_lora_targets,
    check_weights,
    known_ids,
    load_config_and_tokenizer,
    load_weights,
    model_without_weights,
)
from datasets import Dataset
from finetune_options import Options, fpdt_plugin, parse_options
from long_text import (
    RightPadding,
    WindowDataset,
    check_tokenizer,
    document_tokens,
    hold_out,
    plan_eval_windows,
    plan_windows,
    tokenise,
    window_tokens,
    without_held_out_texts,
)
from loss_by_position import Curve, Cut, measure, table_lines, write_csv
from model_card import command_line, write_card
from peft import LoraConfig, get_peft_model
from position_figure import draw
from rope_scaling import RopePlan, apply_rope, beyond_reach, plan_rope
from run_facts import hardware_facts, version_facts
from text_sources import read_documents
from torch import nn
from transformers import (
    PreTrainedConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from user_error import UserError, run_main, tokens_text

from hf_fpdt import FPDTTrainer, apply_fpdt
from hf_fpdt.comms import SequenceParallelGroup, build_group
from hf_fpdt.patch import resolve_chunk_tokens

ROPE_ONLY = {"yarn": "YaRN only, before training", "linear": "linear scaling only, before training"}


@dataclass
class Progress:
    """Prints one line an event, with the seconds since the start, and remembers how long each phase took."""

    began: float = field(default_factory=time.monotonic)
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """From the first process alone: all of them do the same."""
        if PartialState().is_main_process:
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.monotonic() - began


@dataclass(frozen=True)
class Data:
    """Training and evaluation windows, and what the card says about them."""

    training: WindowDataset
    evaluation: WindowDataset
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Everything about a run but its weights."""

    options: Options
    tokenizer: Any
    rope: RopePlan
    data: Data
    progress: Progress
    cut: Cut


class StepPrinter(TrainerCallback):
    """A line an optimizer step: loss, learning rate, seconds, tokens a second."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens = 0
        self._seen_before = 0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seen_before = int(state.num_input_tokens_seen)  # not 0 after --resume

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        step_tokens = int(state.num_input_tokens_seen) - self._seen_before - self.tokens
        self.tokens += step_tokens
        self.losses.append(float(logs["loss"]))
        self.say(
            f"training step {state.global_step} of {state.max_steps}: loss {self.losses[-1]:.4f}, "
            f"lr {logs['learning_rate']:.2e}, {self.seconds[-1]:.1f} s, {step_tokens / self.seconds[-1]:,.0f} tokens/s"
        )


def check_model(options: Options, config: PreTrainedConfig, tokenizer: Any, group: SequenceParallelGroup) -> int:
    """Every check of the model that takes no time; returns how many token ids it knows."""
    model = model_without_weights(options.model, config, fpdt_plugin(options), group)
    if not options.full:
        check_lora_targets(model, options.lora_targets)
    check_tokenizer(tokenizer, known_ids(model))
    check_weights(options.model, config)
    return known_ids(model)


def prepare_data(options: Options, tokenizer: Any, progress: Progress, ids: int) -> Data:
    """Read, hold out, tokenise and plan the windows; says how much of each there is.

    The model knows `ids` token ids.
    """
    documents, held_out, left_out = _documents(options, progress)
    progress.say(f"tokenising {len(documents)} training and {len(held_out)} held-out documents")
    training = tokenise(documents, tokenizer, "training documents", ids)
    evaluation = tokenise(held_out, tokenizer, "held-out documents", ids)
    lengths, eval_lengths = document_tokens(training), document_tokens(evaluation)
    windows = plan_windows(lengths, options.max_length_tokens)
    eval_windows = plan_eval_windows(eval_lengths, options.max_length_tokens, options.eval_docs, options.eval_windows)
    if not windows or window_tokens(eval_windows[0]) < 2:
        raise UserError("data: fewer than two tokens in the training or the held-out documents; give longer documents")
    facts = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "windows": len(windows),
        "full_windows": sum(window_tokens(window) == options.max_length_tokens for window in windows),
        "held_out_documents": len(eval_lengths),
        "eval_documents": sorted({evaluation[window[0].document]["name"] for window in eval_windows}),
        "eval_windows": len(eval_windows),
        "eval_length_tokens": window_tokens(eval_windows[0]),
        "left_out": left_out,
    }
    progress.say(_data_line(facts, options))
    return Data(WindowDataset(training, windows), WindowDataset(evaluation, eval_windows), facts)


def _documents(options: Options, progress: Progress) -> tuple[Dataset, Dataset, list[str]]:
    """(training, held out, what was left out); held-out sources first, for a mistake in them costs little there."""
    left_out: list[str] = []

    def say(line: str) -> None:
        left_out.append(line)
        progress.say(line)

    def read(sources: list[str]) -> Dataset:
        progress.say(f"reading {', '.join(sources)}")
        return read_documents(sources, options.text_column, options.broken_lines, say)

    if options.eval_data:
        held_out, documents = read(options.eval_data), read(options.data)
    else:
        documents, held_out = hold_out(read(options.data), options.eval_fraction, options.seed)
    training = without_held_out_texts(documents, held_out)
    if copies := len(documents) - len(training):
        say(f"training documents left out that are held out too: {copies}")
    return training, held_out, left_out


def _data_line(facts: dict[str, Any], options: Options) -> str:
    short = "" if facts["eval_length_tokens"] == options.max_length_tokens else ": no held-out document is longer"
    return (
        f"{facts['documents']} training documents, {facts['tokens']:,} tokens, {facts['windows']} windows of "
        f"up to {tokens_text(options.max_length_tokens)} ({facts['full_windows']} full); held out: "
        f"{facts['held_out_documents']} documents, {facts['eval_windows']} windows of "
        f"{tokens_text(facts['eval_length_tokens'])}{short}"
    )


def load_model(options: Options, group: SequenceParallelGroup) -> tuple[nn.Module, Cut]:
    """The stock model on its device, with FPDT applied, and how it takes its batches."""
    model = load_weights(options.model, _weight_dtype(options))
    model.to(PartialState().device)
    handle = apply_fpdt(model, fpdt_plugin(options), group)
    return model, Cut.of(handle, resolve_chunk_tokens(handle.plugin, on_gpu=options.device == "cuda"))


def _weight_dtype(options: Options) -> torch.dtype:
    return torch.float32 if options.full and mixed_precision(options) else options.dtype


def mixed_precision(options: Options) -> bool:
    """bfloat16 weights lose updates smaller than 1/256 of a weight: what trains is float32, under autocast."""
    return options.dtype is torch.bfloat16


def with_lora(model: nn.Module, options: Options) -> nn.Module:
    """The PEFT model around the base, or the base itself for full training."""
    if options.full:
        return model
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def training_arguments(options: Options) -> TrainingArguments:
    """Trainer's settings: one log line a step, no network, nothing saved but what --save-every asks for."""
    return TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        bf16=mixed_precision(options),
        use_cpu=options.device == "cpu",
        seed=options.seed,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        logging_steps=1,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every parameter takes part; looking for others costs a graph walk a step
        report_to="none",
        disable_tqdm=True,
    )


def train(job: Job, model: nn.Module) -> tuple[Trainer, StepPrinter]:
    """Run the Trainer; returns it with the record of its steps."""
    steps = StepPrinter(job.progress.say)
    trainer = FPDTTrainer(
        model=model,
        args=training_arguments(job.options),
        train_dataset=job.data.training,
        # What padding is made of reaches no loss; a token for it alone may be one that the model does not know.
        data_collator=RightPadding(job.tokenizer.eos_token_id),
        callbacks=[steps],
        fpdt_plugin=fpdt_plugin(job.options),
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log as a dictionary, beside our line
    trainer.train(resume_from_checkpoint=job.options.resume or None)
    return trainer, steps


def save(trainer: Trainer, tokenizer: Any, output: Path) -> None:
    """Weights as safetensors, tokenizer, and a config that holds the rotary parameters trained with."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    saving = {"save_embedding_layers": False} if base is not model else {}
    if trainer.is_fsdp_enabled:  # every process holds a shard: all of them gather, the first one writes
        saving["state_dict"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if PartialState().is_main_process:
        model.save_pretrained(output, **saving)
        base.config.save_pretrained(output)  # an adapter folder would not hold it, and the base's own is another
        tokenizer.save_pretrained(output)


def main() -> None:
    options = parse_options()
    state = PartialState(cpu=options.device == "cpu")
    progress = Progress()
    config, tokenizer = load_config_and_tokenizer(options.model)
    plan = plan_rope(config, options.rope_scaling, options.rope_factor, options.max_length_tokens)
    if warning := beyond_reach(config, plan, options.max_length_tokens):
        progress.say(warning)
    group = build_group(options.sp_size)
    ids = check_model(options, config, tokenizer, group)
    # Every process at once: nothing is kept for the others, and each of them finds a mistake by itself.
    with progress.phase("data"):
        data = prepare_data(options, tokenizer, progress, ids)
    set_seed(options.seed)
    with progress.phase("load"):
        model, cut = load_model(options, group)
    progress.say(
        f"loaded {options.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {options.device}, "
        f"{state.num_processes} process(es), {options.sp_size} a sequence"
    )
    job = Job(options, tokenizer, plan, data, progress, cut)
    trainer, curves, steps = run(job, model)
    options.output.mkdir(parents=True, exist_ok=True)
    save(trainer, tokenizer, options.output)
    if state.is_main_process:
        report(job, trainer.model, curves, steps)
    trainer.accelerator.end_training()


def run(job: Job, model: nn.Module) -> tuple[Trainer, list[Curve], StepPrinter]:
    """Evaluate, stretch the rotary embedding, evaluate, train, evaluate."""
    options, progress = job.options, job.progress
    windows = [job.data.evaluation[index] for index in range(len(job.data.evaluation))]

    def evaluate(model: nn.Module, label: str) -> Curve:
        with (
            progress.phase("evaluate"),
            torch.autocast(options.device, options.dtype, enabled=mixed_precision(options)),
        ):
            return measure(model, windows, label, progress.say, job.cut)

    curves = [evaluate(model, "before")]
    apply_rope(model, job.rope)
    if job.rope.changes:
        curves.append(evaluate(model, ROPE_ONLY[job.rope.kind]))
    model = with_lora(model, options)
    with progress.phase("train"):
        trainer, steps = train(job, model)
    trained = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    return trainer, [*curves, evaluate(trained, "after")], steps


def collect_facts(job: Job, model: nn.Module, curves: list[Curve], steps: StepPrinter) -> dict[str, Any]:
    """The content of run.json: arguments, data, losses, timing, hardware, versions."""
    options, phases = job.options, job.progress.phase_seconds
    as_text = {"dtype": str(options.dtype).removeprefix("torch."), "output": str(options.output)}
    return {
        "command": command_line(sys.argv[1:]),
        "arguments": {**asdict(options), **as_text},
        "rope": asdict(job.rope),
        "data": job.data.facts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "held_out_loss": {curve.label: curve.mean_loss for curve in curves},
        "training_losses": steps.losses,
        "step_seconds": [round(seconds, 3) for seconds in steps.seconds],
        "training_tokens_per_s": steps.tokens / sum(steps.seconds),
        "phase_seconds": {name: round(seconds, 2) for name, seconds in phases.items()},
        "processes": PartialState().num_processes,
        "hardware": hardware_facts(options.device),
        "versions": version_facts(),
    }


def report(job: Job, model: nn.Module, curves: list[Curve], steps: StepPrinter) -> None:
    """What a reader of the run needs: run.json, the curve as csv and figure, the card, the table on the screen."""
    options, pretrained_tokens = job.options, job.rope.pretrained_tokens
    table = table_lines(curves, pretrained_tokens)
    facts = collect_facts(job, model, curves, steps)
    (options.output / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_csv(options.output / "loss_by_position.csv", curves)
    title = f"Loss by position: {Path(options.model).name} extended to {tokens_text(options.max_length_tokens)} tokens"
    draw(options.output / "loss_by_position.png", curves, pretrained_tokens, title)
    write_card(options.output / "README.md", facts, "\n".join(table))
    print("\nHeld-out loss by position (nats a token):\n", *table, sep="\n")
    job.progress.say(f"wrote the weights, README.md, loss_by_position.png and .csv, run.json to {options.output}")


if __name__ == "__main__":
    run_main(main)
