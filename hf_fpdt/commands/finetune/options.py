"""The command line of finetune.py, and every check that needs neither model nor data."""

import argparse
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rope_scaling import KINDS
from text_sources import BROKEN_LINES, WHAT_IS_READ
from user_error import UserError, one_line, parse_tokens

from hf_fpdt import FPDTPlugin
from hf_fpdt.config import CHECKPOINT_POLICIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DESCRIPTION = "Fine-tune a Hugging Face decoder on long texts, with hf_fpdt (chunked exact attention and loss)."
PACKING = """
Documents longer than --max-length are cut into windows of that length. Shorter documents and the tails of long ones
are put one after another, each closed by an end-of-sequence token, until a window is full; attention is plain causal
attention across them (masks between packed documents are not in this version).
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for, parsed; names as on the command line."""

    model: str
    data: list[str]
    text_column: str
    broken_lines: str
    eval_data: list[str]
    eval_fraction: float
    eval_docs: int
    eval_windows: int
    max_length_tokens: int
    chunk_tokens: int | str
    checkpoints: str
    sp_size: int
    full: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_targets: str | list[str]  # "all-linear" or names
    rope_scaling: str
    rope_factor: float | None
    lr: float
    steps: int
    warmup: int
    batch_size: int
    grad_accum: int
    weight_decay: float
    seed: int
    dtype: torch.dtype
    device: str
    output: Path
    overwrite: bool
    save_every: int
    resume: bool


def build_parser() -> argparse.ArgumentParser:
    """All options with their defaults and units."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=PACKING, formatter_class=formatter)
    _data_arguments(parser.add_argument_group("model and data"))
    _length_arguments(parser.add_argument_group("length"))
    _weight_arguments(parser.add_argument_group("what is trained"))
    _training_arguments(parser.add_argument_group("training"))
    _output_arguments(parser.add_argument_group("output"))
    return parser


def _data_arguments(group: Any) -> None:
    group.add_argument("--model", required=True, help="hub name or folder of a causal language model")
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        help=f"{WHAT_IS_READ}; what else lies in a folder is left out, and counted in the log",
    )
    group.add_argument("--text-column", default="text", help="the column of a table that holds a document's text")
    group.add_argument(
        "--broken-lines",
        choices=BROKEN_LINES,
        default="skip",
        help="lines of a table that can't be read: leave them out and count them in the log, or stop at the first",
    )
    group.add_argument("--eval-data", nargs="+", default=[], help="held-out documents, given like --data")
    group.add_argument(
        "--eval-fraction", type=float, default=0.05, help="documents to hold out when --eval-data is not given"
    )
    group.add_argument("--eval-docs", type=int, default=16, help="held-out documents to evaluate on, at most")
    group.add_argument(
        "--eval-windows", type=int, default=16, help="windows to evaluate on, at most; spread over the documents"
    )


def _length_arguments(group: Any) -> None:
    group.add_argument("--max-length", default="64K", help="tokens of a window; K = 1,024, M = 1,048,576, as in 1M")
    group.add_argument("--chunk-tokens", default="auto", help="tokens of a chunk of FPDT: auto, or a number like 32K")
    group.add_argument(
        "--checkpoints",
        choices=CHECKPOINT_POLICIES,
        default="auto",
        help="what FPDT keeps of each layer for backward; FPDT_DEVICE_BUDGET_GIB, FPDT_HOST_BUDGET_GIB and "
        "FPDT_DISK_DIR say where",
    )
    group.add_argument(
        "--sp-size", type=int, default=1, help="processes that share each sequence; accelerate launch starts them"
    )
    group.add_argument(
        "--rope-scaling", choices=KINDS, default="none", help="how to stretch the rotary position embedding"
    )
    group.add_argument(
        "--rope-factor", default="auto", help="auto (max-length over the pre-training length) or a number"
    )


def _weight_arguments(group: Any) -> None:
    group.add_argument("--full", action="store_true", help="train all weights in place of LoRA")
    group.add_argument("--lora-r", type=int, default=16, help="rank of the LoRA matrices")
    group.add_argument("--lora-alpha", type=int, default=32, help="LoRA scale: alpha / r multiplies the update")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="dropout before the LoRA matrices")
    group.add_argument(
        "--lora-targets", default="all-linear", help="all-linear, or module names with commas, as in q_proj,v_proj"
    )
    group.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU"
    )


def _training_arguments(group: Any) -> None:
    group.add_argument("--lr", type=float, default=2e-4, help="peak learning rate; cosine decay to a tenth follows")
    group.add_argument("--steps", type=int, default=100, help="optimizer steps")
    group.add_argument("--warmup", type=int, default=5, help="steps over which the learning rate rises")
    group.add_argument("--batch-size", type=int, default=1, help="windows of a forward pass")
    group.add_argument("--grad-accum", type=int, default=1, help="forward passes of an optimizer step")
    group.add_argument("--weight-decay", type=float, default=0.0, help="AdamW weight decay")
    group.add_argument("--seed", type=int, default=0, help="for the hold-out, the order of windows, LoRA and dropout")
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one"
    )


def _output_arguments(group: Any) -> None:
    group.add_argument(
        "--output", type=Path, required=True, help="folder for the weights, the model card and the figure"
    )
    group.add_argument("--overwrite", action="store_true", help="write into --output even if it holds files")
    group.add_argument("--save-every", type=int, default=0, help="keep a checkpoint every so many steps; 0: none")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")


def parse_options(arguments: list[str] | None = None) -> Options:
    """Options from the command line; argparse itself leaves with code 2 on unknown or malformed ones."""
    raw = build_parser().parse_args(arguments)
    device = raw.device if raw.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = raw.dtype if raw.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    same = {name: value for name, value in vars(raw).items() if name not in ("max_length", "rope_factor")}
    targets = raw.lora_targets if raw.lora_targets == "all-linear" else raw.lora_targets.split(",")
    parsed: dict[str, Any] = {
        **same,
        "max_length_tokens": parse_tokens("--max-length", raw.max_length),
        "chunk_tokens": "auto" if raw.chunk_tokens == "auto" else parse_tokens("--chunk-tokens", raw.chunk_tokens),
        "lora_targets": targets,
        "rope_factor": _factor(raw.rope_factor),
        "dtype": DTYPES[dtype],
        "device": device,
    }
    options = Options(**parsed)
    check_numbers(options)
    check_output(options)
    return options


def _factor(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < math.inf:
        raise UserError(f"--rope-factor: got {text!r}; allowed: auto or a number from 1 up; leave it out for auto")
    return factor


def check_numbers(options: Options) -> None:
    """Refuse values out of range and combinations that contradict each other."""
    at_least_one = ("eval_docs", "eval_windows", "steps", "batch_size", "grad_accum", "lora_r", "lora_alpha")
    for name in at_least_one:
        if getattr(options, name) < 1:
            _refuse(name, getattr(options, name), "a whole number from 1 up")
    # Not a number is neither below nor above a bound: each range is what a value has to lie in.
    for name in ("warmup", "save_every", "weight_decay"):
        if not 0 <= getattr(options, name) < math.inf:
            _refuse(name, getattr(options, name), "a number from 0 up")
    if not 0 < options.eval_fraction < 1:
        _refuse("eval_fraction", options.eval_fraction, "a number between 0 and 1, as in 0.05")
    if not 0 <= options.lora_dropout < 1:
        _refuse("lora_dropout", options.lora_dropout, "a number from 0 up to 1")
    if not 0 < options.lr < math.inf:
        _refuse("lr", options.lr, "a number above 0, as in 2e-4")
    if not 0 <= options.seed < 2**32:
        _refuse("seed", options.seed, "a whole number from 0 to 4294967295")
    if options.max_length_tokens < 2:
        _refuse("max_length", options.max_length_tokens, "2 tokens or more")
    if options.rope_factor is not None and options.rope_scaling == "none":
        raise UserError("--rope-factor is given, but --rope-scaling is none; add --rope-scaling yarn or linear")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.sp_size < 1 or processes % options.sp_size:
        raise UserError(
            f"--sp-size: got {options.sp_size}; allowed: a number that divides this job's {processes} process(es); "
            "start more with accelerate launch --num_processes N"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")


def _refuse(name: str, got: object, allowed: str) -> None:
    raise UserError(f"--{name.replace('_', '-')}: got {got}; allowed: {allowed}")


def check_output(options: Options) -> None:
    """Make the folder, so that hours of work do not end at it; never mix two runs in one folder by accident."""
    if options.resume and not list(options.output.glob("checkpoints/checkpoint-*")):
        raise UserError(
            f"--resume: {options.output}/checkpoints holds no checkpoint; start without --resume, with --save-every N"
        )
    if os.environ.get("RANK", "0") != "0":
        return  # the first process writes, and the others might find what it has written
    make_folder(options.output)
    if any(options.output.iterdir()) and not (options.overwrite or options.resume):
        raise UserError(
            f"--output: the folder {options.output} is not empty; give a new one, or add --overwrite, or "
            "--resume to go on"
        )


def make_folder(folder: Path) -> None:
    """Make the folder and write into it: nothing else shows that it can be done."""
    try:
        if folder.is_file():
            raise UserError(f"--output: {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"--output: the folder {folder} can't be made or written: {one_line(error)}; give one that can be"
        ) from error


def fpdt_plugin(options: Options) -> FPDTPlugin:
    """The settings of hf_fpdt that the command line offers."""
    return FPDTPlugin(chunk_tokens=options.chunk_tokens, checkpoints=options.checkpoints, sp_size=options.sp_size)
