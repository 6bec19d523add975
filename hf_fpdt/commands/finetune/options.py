"""What the command line of `hf-fpdt finetune` offers, and every check that needs neither model nor data."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ...config import CHECKPOINT_POLICIES, KERNEL_NAMES, FPDTPlugin
from ...parallel import how_to_start
from ..options import UserMistake, count, mistakes, tokens
from ..parser import CommandParser
from .rope import KINDS
from .trainer_options import DEFAULTS, build_arguments, trainer_values

DTYPES = MappingProxyType({"float32": torch.float32, "bfloat16": torch.bfloat16})
WHAT_IS_READ = (
    "text and source files, tables (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), each also as .gz, folders of "
    "these, or hub data sets"
)


def option(default: Any, text: str, **arguments: Any) -> Any:
    """A field of options with its help and what else argparse is told; `...` for an option that must be given."""
    metadata = {"help": text, **arguments}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is adapted."""

    model: str = option(..., "hub name or folder of a causal language model", metavar="NAME")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the weights; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    quantize: Literal["none", "nf4", "int8"] = option(
        "none", "keep the base's linears in 4 bits (NF4, scales quantised too) or 8 under the adapters; bitsandbytes"
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What it reads."""

    data: list[str] = option(
        ..., f"{WHAT_IS_READ}; what else lies in a folder is left out, and counted in the log", metavar="PATH"
    )
    text_column: str = option("text", "the column of a table that holds a document's text", metavar="NAME")
    broken_lines: Literal["skip", "error"] = option(
        "skip", "lines of a table that can't be read: leave them out and count them in the log, or stop at the first"
    )
    eval_data: list[str] = option([], "held-out documents, given like --data", metavar="PATH")
    eval_fraction: float = option(0.05, "documents to hold out when --eval_data is not given", metavar="FRACTION")
    eval_docs: int = option(16, "held-out documents to evaluate on, at most", metavar="N")
    eval_windows: int = option(16, "windows to evaluate on, at most; spread over the documents", metavar="N")


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How far."""

    max_length: int = option(64 * 1024, "tokens of a window: 8192, 32K (1,024 each), 1M", metavar="TOKENS")
    long_documents: Literal["drop", "cut", "error"] = option(
        "drop", "those longer than a window: leave them out and count them, cut them in pieces, or stop"
    )
    rope_scaling: str = option("none", "how to stretch the rotary position embedding", choices=KINDS)
    rope_factor: str = option(
        "auto", "auto (max_length over the pre-training length) or a number from 1", metavar="FACTOR"
    )


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Which weights train."""

    full: bool = option(False, "train all weights in place of LoRA")
    lora_r: int = option(16, "rank of the LoRA matrices", metavar="N")
    lora_alpha: int = option(32, "LoRA scale: alpha / r multiplies the update", metavar="N")
    lora_dropout: float = option(0.0, "dropout before the LoRA matrices", metavar="P")
    lora_target_modules: list[str] = option(
        ["all-linear"], "all-linear, or names of modules, as in q_proj v_proj", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where it goes."""

    merge: bool = option(False, "write the model with the adapter in its weights too, to OUTPUT_DIR/merged")
    overwrite: bool = option(False, "write into --output_dir even if it holds files")
    resume: bool = option(
        False, "go on from the last checkpoint in --output_dir; what is not given is as the run was started with"
    )


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions, DataOptions, LengthOptions, WeightOptions, OutputOptions):
    """This command's own options, with what they come to beside other libraries'."""

    plugin: FPDTPlugin
    trainer: TrainingArguments
    words: tuple[str, ...]

    @property
    def device(self) -> str:
        """Where the model lies."""
        return str(self.trainer.device.type)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the base model; weights that train under autocast are float32."""
        return torch.float32 if self.full and (self.trainer.bf16 or self.trainer.fp16) else self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """What --dtype comes to here."""
        return dtype_of(self.dtype, on_gpu=self.device == "cuda")

    @property
    def factor(self) -> float | None:
        """How far the rotary embedding is stretched; None for "auto"."""
        return None if self.rope_factor == "auto" else float(self.rope_factor)

    @property
    def targets(self) -> str | list[str]:
        """Modules to train adapters of, as peft takes them."""
        names = [name for words in self.lora_target_modules for name in words.split(",")]
        return "all-linear" if names == ["all-linear"] else names

    def own(self) -> dict[str, Any]:
        """This command's own options by name, for run.json."""
        names = [f.name for group in GROUPS.values() for f in fields(group)]
        return {**{name: getattr(self, name) for name in names}, "dtype": str(self.torch_dtype).removeprefix("torch.")}


GROUPS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "model": ModelOptions,
        "data": DataOptions,
        "length": LengthOptions,
        "what is trained": WeightOptions,
        "output": OutputOptions,
    }
)
PLUGIN_HELP: MappingProxyType[str, str] = MappingProxyType(
    {
        "sp_size": "processes that share each sequence; accelerate launch starts them",
        "chunk_tokens": "tokens of a chunk over its processes: auto, or a number like 32K; fewer take less memory",
        "kernel": "attention kernel: " + ", ".join(KERNEL_NAMES),
        "checkpoints": "what is kept of each layer for backward: " + ", ".join(CHECKPOINT_POLICIES),
        "device_budget_gib": "GPU memory that K, V and checkpoints may fill: auto, or GiB",
        "host_budget_gib": "pinned host memory that they may fill, of each process: auto, or GiB",
        "disk_dir": "folder on a local SSD for what neither holds",
        "host_weights": "keep layers' frozen weights in pinned host memory, fetched as they are used: yes or no",
        "loss_chunk_tokens": "tokens whose logits exist at a time: auto, or a number",
        "fused": "run faster twins of a layer's own pieces: yes or no",
        "progress": "show a line inside long steps: yes or no",
    }
)
EVERY_TRAINER_FIELD = """\
Every field of transformers.TrainingArguments is an option by its own name; --help-all shows them with the defaults
of this command, which are not always those of transformers. The most used ones:
  --output_dir FOLDER (--output)   for the weights, the model card, the figure and checkpoints; must be given
  --max_steps N (--steps)          optimizer steps; 100, unless --num_train_epochs is given
  --learning_rate LR (--lr)        2e-4 at its peak, after --warmup_steps 5; a cosine falls to a tenth of it
  --per_device_train_batch_size N, --gradient_accumulation_steps N, --optim, --lr_scheduler_type, --weight_decay
  --save_steps N                   a checkpoint every N steps; a twentieth of all; --save_strategy no for none
  --save_total_limit N             so many checkpoints are kept: 2
  --eval_steps N                   held-out loss every N steps; with --eval_data three times; --eval_strategy no
  --logging_steps N, --report_to tensorboard (default: none)
  --use_cpu                        train on the CPU though there is a GPU
"""


def add_options(parser: CommandParser) -> None:
    """All options, ours first."""
    parser.add_config()
    for title, group in GROUPS.items():
        parser.add_options(title, group)
    parser.add_options("FPDT", _plugin_options(), "Left out: FPDT_* of the environment, or the plugin's default.")
    parser.add_options("training", TrainingArguments, EVERY_TRAINER_FIELD, hidden=True)
    parser.set_defaults(**DEFAULTS)
    counts = ("eval_docs", "eval_windows", "lora_r", "lora_alpha")
    parser.set_types({"max_length": tokens, **dict.fromkeys(counts, count)})
    parser.require("output_dir")


def _plugin_options() -> type:
    """Text options for the fields of FPDTPlugin, which reads the same text from the environment."""
    made = []
    for plugin_field in fields(FPDTPlugin):
        name = plugin_field.name
        arguments: dict[str, Any] = {"metavar": name.rpartition("_")[2].upper()}
        if plugin_field.type == "bool":
            arguments = {"metavar": "YES|NO", "nargs": "?", "const": "yes"}
        made.append((name, str | None, option(None, PLUGIN_HELP.get(name, "see hf_fpdt.FPDTPlugin"), **arguments)))
    return dataclasses.make_dataclass("PluginOptions", made)


def read_options(parsed: argparse.Namespace) -> Options:
    """Options with everything they come to; sets up this process's device."""
    names = [f.name for group in GROUPS.values() for f in fields(group)]
    own = {name: getattr(parsed, name) for name in names}
    plugin = fpdt_plugin({f.name: getattr(parsed, f.name) for f in fields(FPDTPlugin)})
    _check_numbers(own)
    on_gpu = torch.cuda.is_available() and not parsed.use_cpu
    half = dtype_of(parsed.dtype, on_gpu=on_gpu) == torch.bfloat16
    values = trainer_values(parsed, on_gpu=on_gpu, half=half)
    return Options(**own, plugin=plugin, trainer=build_arguments(values, plugin), words=tuple(parsed.words))


def dtype_of(name: str, *, on_gpu: bool) -> torch.dtype:
    """What --dtype comes to; "auto" is bfloat16 on a GPU, float32 on a CPU."""
    return DTYPES[name if name != "auto" else ("bfloat16" if on_gpu else "float32")]


def fpdt_plugin(texts: Mapping[str, str | None]) -> FPDTPlugin:
    """The plugin of what was given; what was not comes from the environment, or is its default."""
    values = {}
    for plugin_field in fields(FPDTPlugin):
        text = texts.get(plugin_field.name)
        if text is None:
            continue
        try:
            values[plugin_field.name] = plugin_field.metadata["parse"](text)
        except ValueError as error:
            raise UserMistake(f"--{plugin_field.name}: got {text!r}; {error}") from error
    with mistakes(ValueError):
        plugin = FPDTPlugin(**values)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes % plugin.sp_size:
        raise UserMistake(
            f"--sp_size: got {plugin.sp_size}; allowed: a number that divides this job's {processes} process(es); "
            + how_to_start(plugin.sp_size, "-m hf_fpdt.commands.finetune")
        )
    return plugin


def _check_numbers(own: Mapping[str, Any]) -> None:
    """Refuse values out of range and combinations that contradict each other."""
    # Not a number is neither below nor above a bound: each range is what a value has to lie in.
    if not 0 < own["eval_fraction"] < 1:
        raise UserMistake(
            f"--eval_fraction: got {own['eval_fraction']}; allowed: a number between 0 and 1, as in 0.05"
        )
    if not 0 <= own["lora_dropout"] < 1:
        raise UserMistake(f"--lora_dropout: got {own['lora_dropout']}; allowed: a number from 0 up to 1")
    if own["max_length"] < 2:
        raise UserMistake(f"--max_length: got {own['max_length']}; allowed: 2 tokens or more")
    factor = own["rope_factor"]
    if factor == "auto":
        return
    if not _is_factor(factor):
        raise UserMistake(f"--rope_factor: got {factor!r}; allowed: auto or a number from 1 up; leave it out for auto")
    if own["rope_scaling"] == "none":
        raise UserMistake("--rope_factor is given, but --rope_scaling is none; add --rope_scaling yarn or linear")


def _is_factor(text: str) -> bool:
    try:
        return 1 <= float(text) < math.inf
    except ValueError:
        return False
