"""One run of `hf-fpdt finetune`: checks, data, weights; evaluate, train, evaluate; save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PrinterCallback, Trainer, set_seed

from ...config import resolve_chunk_tokens
from ...model import apply_fpdt, mapping_with_rope, weight_count, without_adapters
from ...parallel import SequenceParallelGroup, build_group
from ...training import FPDTTrainer, PackingCollator, say_what_is_done
from ..eval.curves import Curve
from ..eval.loss_by_position import Cut, measure
from ..options import mistakes
from .base_model import (
    applying,
    check_lora_targets,
    check_weights,
    known_ids,
    load_config_and_tokenizer,
    load_weights,
    model_without_weights,
)
from .data import Data, prepare_data
from .facts import Outcome, report
from .merge import check_merge, merged_folder, write_merged
from .options import Options
from .output import (
    check_data,
    check_output,
    checkpoint_of,
    finished,
    new_length,
    result_is_written,
    windows_a_step,
    write_settings,
)
from .quantise import check_quantize, compute_dtype, loading, plain_config, quantised_lines, to_device_but_for_layers
from .rope import RopePlan, apply_rope, beyond_reach, plan_rope
from .steps import NothingLeftError, Progress, StepPrinter, quiet
from .trainer_options import autocast_dtype, check_trainer, intervals_line, passes_line
from .windows import check_tokenizer

ROPE_ONLY = MappingProxyType({"yarn": "YaRN only, before training", "linear": "linear scaling only, before training"})


@dataclass(frozen=True)
class Job:
    """Everything about a run but its weights."""

    options: Options
    tokenizer: Any
    rope: RopePlan
    data: Data
    progress: Progress
    cut: Cut
    checkpoint: Path | None


def run(options: Options) -> None:
    """The whole command."""
    quiet()
    check_output(options)
    progress = Progress()
    checkpoint = checkpoint_of(options)
    if checkpoint is not None and (reason := finished(checkpoint, options)):
        progress.say(reason)
        return
    if checkpoint is not None and (changed := new_length(checkpoint, options)):
        progress.say(changed)
    config, tokenizer = load_config_and_tokenizer(options.model)
    rope = plan_rope(config, options.rope_scaling, options.factor, options.max_length)
    if warning := beyond_reach(config, rope, options.max_length):
        progress.say(warning)
    group = build_group(options.plugin.sp_size)
    ids = check_model(options, config, tokenizer, group)
    # Every process at once: nothing is kept for the others, and each of them finds a mistake by itself.
    with progress.phase("data"):
        data = prepare_data(options, tokenizer, progress, ids)
    _keep_settings(options, checkpoint, data)
    set_seed(options.trainer.seed)
    with progress.phase("load"):
        model, cut = load_model(options, group, config)
    progress.say(
        f"loaded {options.model}: {weight_count(model):,} parameters on {options.device}, "
        f"{PartialState().num_processes} process(es), {options.plugin.sp_size} a sequence"
    )
    for line in quantised_lines(model, options.weight_dtype):
        progress.say(line)
    progress.say(passes_line(options.trainer, data.facts["windows"], a_step=windows_a_step(options)))
    progress.say(intervals_line(options.trainer))
    _work(Job(options, tokenizer, rope, data, progress, cut, checkpoint), model)


def check_model(options: Options, config: PreTrainedConfig, tokenizer: Any, group: SequenceParallelGroup) -> int:
    """Every check of the model that takes no time; returns how many token ids it knows."""
    model = model_without_weights(options.model, config, options.plugin, group)
    check_merge(options, config)
    check_quantize(options, config)
    if not options.full:
        check_lora_targets(model, options.targets)
    check_tokenizer(tokenizer, known_ids(model))
    check_trainer(options.trainer, options.plugin, group, model)
    check_weights(options.model, config)
    return known_ids(model)


def _keep_settings(options: Options, checkpoint: Path | None, data: Data) -> None:
    if checkpoint is not None:
        check_data(checkpoint, data.facts)
    if PartialState().is_main_process:
        write_settings(options, data.facts)


def load_model(options: Options, group: SequenceParallelGroup, config: PreTrainedConfig) -> tuple[nn.Module, Cut]:
    """The stock model on its device, with FPDT applied, and how it takes its batches."""
    waits, device = options.plugin.host_weights, options.trainer.device
    how = loading(options.quantize, config, compute_dtype(options), torch.device("cpu") if waits else device)
    model = load_weights(options.model, options.weight_dtype, how=how)
    if not how and not waits:  # quantised weights are there already
        model.to(device)
    say_what_is_done()
    with applying(options.model), mistakes(MemoryError):  # some layers show what they are once they have weights
        handle = apply_fpdt(model, options.plugin, group)
    if waits:
        to_device_but_for_layers(model, device)
    return model, Cut.of(handle, resolve_chunk_tokens(handle.plugin, on_gpu=options.device == "cuda"))


def _work(job: Job, model: nn.Module) -> None:
    trainer, curves, steps = evaluate_and_train(job, model)
    save(trainer, job.tokenizer, job.options)
    if PartialState().is_main_process:
        report(Outcome(job.options, job.rope, job.data, job.progress, curves, steps), trainer.model)
        if folder := merged_folder(job.options):
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            if job.options.plugin.host_weights:
                model.to("cpu")
            write_merged(model, job.tokenizer, folder, job.options.torch_dtype)
            job.progress.say(f"wrote the model with the adapter in it to {folder}")
        result_is_written(job.options, steps.global_step)
    trainer.accelerator.end_training()


def evaluate_and_train(job: Job, model: nn.Module) -> tuple[Trainer, list[Curve], StepPrinter]:
    """Evaluate, stretch the rotary embedding, evaluate, train, evaluate."""
    options, progress = job.options, job.progress
    windows = [job.data.evaluation[index] for index in range(len(job.data.evaluation))]
    narrow = autocast_dtype(options.trainer)

    def evaluate(model: nn.Module, label: str) -> Curve:
        with (
            progress.phase("evaluate"),
            torch.autocast(options.device, narrow, enabled=narrow is not None),
            mistakes(NotImplementedError),
        ):
            return measure(model, windows, label, progress.say, job.cut)

    curves = [evaluate(model, "before")]
    apply_rope(model, job.rope)
    if job.rope.changes:
        curves.append(evaluate(model, ROPE_ONLY[job.rope.kind]))
    model = with_lora(model, options)
    if options.plugin.host_weights:  # PEFT makes adapters where the weights are
        to_device_but_for_layers(model, options.trainer.device)
    with progress.phase("train"):
        trainer, steps = train(job, model)
    trained = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    return trainer, [*curves, evaluate(trained, "after")], steps


def with_lora(model: Any, options: Options) -> nn.Module:
    """The PEFT model around the base, or the base itself for full training."""
    if options.full:
        return model
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.targets,
        exclude_modules=(without_adapters(model) or None) if options.targets == "all-linear" else None,
        task_type="CAUSAL_LM",
        auto_mapping=mapping_with_rope(model),
    )
    with mistakes(ValueError):  # modules that PEFT has no adapters for
        return get_peft_model(model, config)


def train(job: Job, model: nn.Module) -> tuple[Trainer, StepPrinter]:
    """Run the Trainer; returns it with the record of its steps."""
    steps = StepPrinter(job.progress.say)
    with mistakes(NotImplementedError, ValueError, ImportError):
        trainer = FPDTTrainer(
            model=model,
            args=job.options.trainer,
            train_dataset=job.data.training,
            eval_dataset=job.data.evaluation,
            data_collator=PackingCollator(),
            callbacks=[steps],
            fpdt_plugin=job.options.plugin,
        )
    trainer.remove_callback(PrinterCallback)  # it would print every log as a dictionary, beside our line
    try:
        trainer.train(resume_from_checkpoint=None if job.checkpoint is None else str(job.checkpoint))
    except NothingLeftError:
        job.progress.say(f"{job.checkpoint} is of the last step: what was not written of its result is written now")
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    return trainer, steps


def save(trainer: Trainer, tokenizer: Any, options: Options) -> None:
    """Weights as safetensors, tokenizer, and a config that holds the rotary parameters trained with."""
    output = Path(options.trainer.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    saving = {"save_embedding_layers": False} if base is not model else {}
    if trainer.is_fsdp_enabled:  # every process holds a shard: all of them gather, the first one writes
        saving["state_dict"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if PartialState().is_main_process:
        model.save_pretrained(output, **saving)
        # An adapter folder would not hold it, and the base's own is another.
        plain_config(base.config, options.quantize).save_pretrained(output)
        tokenizer.save_pretrained(output)
