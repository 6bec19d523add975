"""`hf-fpdt bench`: steps of this package and of others side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ...model import QUANTISED_KINDS, check_quantised_here, training_of
from ...plan import LayersDiffer
from ..options import (
    DEFAULT_SHAPE,
    UserMistake,
    add_model,
    amount,
    check_settings,
    check_writable,
    config_of,
    corpus_of,
    count,
    mistakes,
    new_parser,
    tokens,
)
from .children import Children, command_for
from .driver import Bench
from .figures import FORMULAS, Trained
from .job import Job
from .report import OK, Files, as_table, conditions_line
from .stacks.base import Unavailable
from .stacks.catalogue import STACKS

LIMIT_S = 1800

HELP = """\
Measures training steps (forward, loss, backward, optimizer) of one model under several ways to train it ("stacks"),
each stack and length in a process of its own, so that running out of memory is a line of the table and not its end.

No stack gets a speed before its loss and gradients were compared with plain Hugging Face: against float64, their error
may be at most twice that of plain Hugging Face in the same dtype. One that fails gets a line that says so.

Weights and tokens are random and the same for all: the sizes are what matters, so of a model only the configuration is
read. Without a GPU it runs too, for small models; the columns that need one stay empty.

stacks:
"""
EXAMPLES = """\
examples:
  hf-fpdt bench --seq-len 32K 64K --stacks fpdt hf liger      Llama-3.1-8B's shape, LoRA, three stacks
  hf-fpdt bench --shape llama-1b --full --seq-len 128K --csv steps.csv
  hf-fpdt bench ./my-model --layers 4 --seq-len 16K           a model folder's own shape, four layers of it
  hf-fpdt bench --gpus 2 --seq-len 128K --stacks fpdt         two GPUs share the sequence
  hf-fpdt bench --stacks fpdt --seq-len 256K --documents lognormal:8K,1.2    a row of packed documents
  hf-fpdt bench --longest --stacks fpdt hf-offload            the longest sequence that completes a step

FPDT's settings beside the chunk are taken from FPDT_* variables, as in training. A stack of your own is module:Class,
a subclass of hf_fpdt.commands.bench.stacks.base.Stack.
"""


def description() -> str:
    """What the command does, and every stack in a line."""
    return HELP + "\n".join(f"  {name:<11} {kind.about}" for name, kind in STACKS.items())


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but MODEL and --shape."""
    what = parser.add_argument_group("what to measure")
    what.add_argument("--stacks", nargs="+", default=["fpdt", "hf"], metavar="STACK", help="default: fpdt hf")
    what.add_argument(
        "--seq-len", type=tokens, nargs="+", default=[32_768], metavar="TOKENS", help="8192 128K 1M … (default: 32K)"
    )
    what.add_argument(
        "--longest",
        action="store_true",
        help="of each stack the longest sequence that completes a step, to about 3 %%, looked for among "
        "and from the given --seq-len on",
    )
    how = parser.add_argument_group("how")
    what.add_argument(
        "--documents",
        metavar="HOW",
        help="rows are packed of documents: lognormal:MEAN,SIGMA in tokens, as in lognormal:8K,1.2, or a JSON file "
        "with a list of lengths (default: one document a row)",
    )
    how.add_argument("--layers", type=count, help="layers of the model to keep (default: all)")
    how.add_argument("--full", action="store_true", help="train every weight (default: LoRA, rank 16, all linears)")
    how.add_argument(
        "--quantize",
        choices=QUANTISED_KINDS,
        help="hold the linears under the adapters in 4 or 8 bits (bitsandbytes; default: in --dtype)",
    )
    how.add_argument("--chunk-tokens", type=tokens, metavar="TOKENS", help="FPDT's chunk (default: its own choice)")
    how.add_argument(
        "--steps", type=count, default=3, help="steps, the first left out of the median (default: %(default)s)"
    )
    how.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    how.add_argument(
        "--gpus",
        type=count,
        default=1,
        metavar="N",
        help="GPUs of this host that train one model together, a process each; with --device cpu so many processes "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--held-gib",
        type=amount,
        default=0.0,
        metavar="GIB",
        help="memory of each GPU to take away first, as that of the layers left out by --layers (default: none)",
    )
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: the GPU, if any")
    how.add_argument(
        "--limit",
        type=count,
        default=LIMIT_S,
        metavar="SECONDS",
        help="end what takes longer; that is a line too (default: %(default)s)",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--csv", type=Path, metavar="FILE", help="every figure and condition, added as lines")
    output.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON, an object a line")


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    parser = new_parser(
        commands,
        bench,
        about="steps of this package and of others side by side: speed, memory, the longest sequence",
        description=description(),
        epilog=EXAMPLES,
    )
    add_model(parser.add_argument_group("what to train").add_mutually_exclusive_group())
    add_options(parser)


def bench(options: argparse.Namespace) -> int:
    """`hf-fpdt bench`: check every stack, measure every length, print the table; 1 where no row has a step."""
    for path in (options.csv, options.json):
        if path is not None:
            check_writable(path)
    check_settings()
    if options.quantize is not None:
        if options.full:
            raise UserMistake(f"--quantize {options.quantize}: quantised weights do not train; leave --full out.")
        with mistakes(ImportError):
            check_quantised_here()
    with mistakes(LayersDiffer):
        training = training_of(config_of(options, layers=options.layers), lora=False)
    shape = options.shape or DEFAULT_SHAPE
    job = _job(options, shape)
    documents = None if options.documents is None else corpus_of(options.documents)
    with mistakes(Unavailable):
        for name in STACKS.keys() & options.stacks:
            STACKS[name].check_gpus(options.gpus)
            STACKS[name].check_packs(options.documents)
    with mistakes(FileExistsError):
        files, rows = Files(options.csv, options.json), []
    with Children(options.limit, command_for(options.gpus)) as children:
        measured = Bench(
            job=job,
            stacks=tuple(options.stacks),
            trained=Trained(
                sizes=training.model, vocabulary=training.vocabulary, full=options.full, documents=documents
            ),
            name=options.model or shape,
            longest=options.longest,
            run=children.run,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        for row in measured.rows():
            files.add(row)
            rows.append(row)
    print(as_table(rows))
    print(f"\n{conditions_line(rows)}\n\n{FORMULAS}")
    return 0 if any(row["result"] == OK for row in rows) else 1


def _job(options: argparse.Namespace, shape: str) -> Job:
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UserMistake("--device cuda: torch finds no CUDA GPU here; leave the option out, or take --device cpu.")
    device = options.device if options.device != "auto" else "cuda" if has_gpu else "cpu"
    if options.held_gib and device == "cpu":
        raise UserMistake("--held-gib: it holds memory of a GPU, and this is a CPU; leave the option out.")
    found = torch.cuda.device_count() if device == "cuda" else options.gpus
    if options.gpus > found:
        raise UserMistake(f"--gpus {options.gpus}: torch finds {found} here; take as many at most.")
    return Job(
        kind="step",
        stack="",
        model=options.model,
        shape=shape,
        layers=options.layers,
        full=options.full,
        tokens=tuple(options.seq_len),
        steps=options.steps,
        chunk_tokens=options.chunk_tokens,
        device=device,
        dtype=options.dtype,
        gpus=options.gpus,
        held_gib=options.held_gib,
        documents=options.documents,
        quantised=options.quantize,
    )
