"""TrainingArguments of a run: our defaults where they differ, what follows from other options, what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ...config import FPDTPlugin
from ...parallel import SequenceParallelGroup
from ...training import join_group, refused_options
from ..options import UserMistake, mistakes

# Everything that differs from transformers' own defaults; None: `_derived` decides where the user has not.
DEFAULTS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "learning_rate": 2e-4,
        # Its warmup begins above zero: with the others the first step, of minutes at these lengths, changes nothing.
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": None,
        "max_steps": None,
        "num_train_epochs": None,
        "warmup_steps": 5,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "seed": 0,
        "bf16": None,
        "use_cpu": None,
        "save_strategy": None,
        "save_steps": None,
        "save_total_limit": 2,
        "eval_strategy": None,
        "eval_steps": None,
        "logging_steps": 1,
        "include_num_input_tokens_seen": True,
        "remove_unused_columns": False,
        # Every parameter takes part; looking for others costs a graph walk a step.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
)
MAX_STEPS = 100
# Of all steps, as Trainer takes numbers below 1: of a run of 36 hours less than two are lost; an evaluation on 16
# windows takes as long as four or five steps, and one follows the last step anyway.
SAVE_SHARE = 0.05
EVAL_SHARE = 0.3
MIN_LR_RATE = 0.1
ALIASES = MappingProxyType({"--output_dir": ("--output",), "--max_steps": ("--steps",), "--learning_rate": ("--lr",)})
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
FROM_ZERO = ("warmup_steps", "weight_decay", "max_grad_norm")
LARGEST_SEED = 2**32 - 1


def trainer_values(options: argparse.Namespace, *, on_gpu: bool, half: bool) -> dict[str, Any]:
    """Arguments for TrainingArguments; what is None here is left to it.

    Args:
        options: the parsed command line.
        on_gpu: whether there is a GPU to use.
        half: whether the weights are to be in bfloat16.
    """
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    values = {name: getattr(options, name) for name in names}
    derived = _derived(values, on_gpu=on_gpu, half=half, held_out=bool(options.eval_data))
    values = {name: derived.get(name) if values[name] is None else values[name] for name in names}
    _check_numbers(values)
    return {name: value for name, value in values.items() if value is not None}


def _derived(values: dict[str, Any], *, on_gpu: bool, half: bool, held_out: bool) -> dict[str, Any]:
    """For options that the user has left open."""
    by_rate = values["lr_scheduler_type"] in ("cosine_warmup_with_min_lr", "cosine_with_min_lr")
    return {
        "max_steps": MAX_STEPS if values["num_train_epochs"] is None else -1,
        "lr_scheduler_kwargs": {"min_lr_rate": MIN_LR_RATE} if by_rate else None,
        # bfloat16 weights lose updates smaller than 1/256 of a weight: what trains is float32, under autocast.
        "bf16": half and not values["fp16"],
        "use_cpu": not on_gpu,
        **_intervals(values, held_out=held_out),
    }


def _intervals(values: dict[str, Any], *, held_out: bool) -> dict[str, Any]:
    """When checkpoints are kept and the held-out loss is measured."""
    best, eval_strategy, eval_steps = (values[n] for n in ("load_best_model_at_end", "eval_strategy", "eval_steps"))
    asked = held_out and not best or eval_steps is not None
    steps = values["max_steps"] or (MAX_STEPS if values["num_train_epochs"] is None else -1)

    def every(share: float) -> float:
        return math.ceil(steps * share) if steps > 0 else share

    return {
        "eval_strategy": "steps" if asked else "no",
        "eval_steps": every(EVAL_SHARE),
        # What is found best has to be saved where it was measured.
        "save_strategy": eval_strategy if best and eval_strategy else "steps",
        "save_steps": (eval_steps or every(EVAL_SHARE)) if best else every(SAVE_SHARE),
    }


def passes_line(arguments: TrainingArguments, windows: int, *, a_step: int) -> str:
    """How often the training windows are gone through, to be said before it; a few of them are learnt by heart.

    Args:
        windows: that there are.
        a_step: that an optimizer step takes.
    """
    if arguments.max_steps <= 0:
        return f"training: {arguments.num_train_epochs:g} times through {windows} windows, {a_step} a step"
    times = arguments.max_steps * a_step / windows
    return f"training: {arguments.max_steps} steps, {a_step} of {windows} windows each: {times:.3g} times through them"


def intervals_line(arguments: TrainingArguments) -> str:
    """What is kept and measured during training, to be said before it."""
    kept = f", the last {arguments.save_total_limit} are kept" if arguments.save_total_limit else ""
    saves = _every(arguments.save_strategy, arguments.save_steps)
    evaluations = _every(arguments.eval_strategy, arguments.eval_steps)
    return f"checkpoints in training: {saves}{'' if saves == 'none' else kept}; evaluations in training: {evaluations}"


def _every(strategy: Any, steps: float | None) -> str:
    if strategy != "steps" or steps is None:
        return {"no": "none", "epoch": "every epoch"}.get(str(strategy.value), f"as {strategy.value} has it")
    return f"every {steps:.0%} of the steps" if steps < 1 else f"every {steps:g} steps"


def _check_numbers(values: dict[str, Any]) -> None:
    """Ranges that TrainingArguments does not look at; not a number is in none of them."""
    for name in COUNTS:
        _check(name, values[name], lambda value: value >= 1, "a whole number from 1 up")
    for name in FROM_ZERO:
        _check(name, values[name], lambda value: 0 <= value < math.inf, "a number from 0 up")
    lr, seed = values["learning_rate"], values["seed"]
    _check("learning_rate", lr, lambda value: 0 < value < math.inf, "a number above 0, as in 2e-4")
    _check("seed", seed, lambda value: 0 <= value <= LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}")
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    _check("max_steps", steps, lambda value: value >= 1 or value == -1, "a whole number from 1 up")
    if steps == -1:
        allowed = "a number above 0; or give --max_steps"
        _check("num_train_epochs", epochs, lambda value: value is not None and 0 < value < math.inf, allowed)


def _check(name: str, value: Any, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    if not is_allowed(value):
        raise UserMistake(f"--{name}: got {value}; allowed: {allowed}")


def build_arguments(values: dict[str, Any], plugin: FPDTPlugin) -> TrainingArguments:
    """TrainingArguments, which set up this process's device; refuses what FPDTTrainer would refuse later."""
    for name, instead in (("push_to_hub", "upload the folder afterwards: hf upload NAME FOLDER"), ("do_predict", "")):
        if values.get(name):
            raise UserMistake(f"--{name}: this command does not do that; leave it out{instead and ', and '}{instead}")
    if values.get("load_best_model_at_end") and str(values.get("eval_strategy", "no")) == "no":
        raise UserMistake("--load_best_model_at_end: nothing says which is best; add --eval_strategy, --save_strategy")
    with mistakes(ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError):
        arguments = TrainingArguments(**values)
    trainer = SimpleNamespace(args=arguments, compute_metrics=None, compute_loss_func=None)
    if reasons := refused_options(trainer, plugin.sp_size):
        raise UserMistake(f"FPDT cannot run this Trainer: {'; '.join(reasons)}")
    return arguments


def check_trainer(
    arguments: TrainingArguments, plugin: FPDTPlugin, group: SequenceParallelGroup, model: PreTrainedModel
) -> None:
    """Let a Trainer of next to nothing say now what one of `model` would after the first evaluation.

    That is what is not installed (optimizers, services that logs are reported to), and what FPDT refuses of its
    Accelerator.
    """
    with mistakes(ImportError, NotImplementedError, RuntimeError, ValueError):
        trial = Trainer(model=nn.Linear(1, 1), args=arguments, train_dataset=[0], eval_dataset=[0])
        join_group(trial.accelerator, plugin, group)
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)


def autocast_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """The dtype that training computes in beside the weights' own; None without autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision)
