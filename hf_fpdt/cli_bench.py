"""`hf-fpdt bench`: training steps under several ways to train, side by side."""

from __future__ import annotations

import argparse
import sys

import torch

from .bench.catalogue import STACKS
from .bench.children import Children, command_for
from .bench.driver import Bench
from .bench.figures import FORMULAS, Trained
from .bench.job import Job
from .bench.options import EXAMPLES, add_options, description
from .bench.report import Files, as_table, conditions_line
from .bench.stack import Unavailable
from .by_layer import LayersDiffer
from .cli_options import DEFAULT_SHAPE, UserMistake, add_model, check_settings, check_writable, config_of, mistakes
from .plan_report import training_of


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "bench",
        help="steps of this package and of others side by side: speed, memory, the longest sequence",
        description=description(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=bench)
    add_model(parser.add_argument_group("what to train").add_mutually_exclusive_group())
    add_options(parser)


def bench(options: argparse.Namespace) -> None:
    """`hf-fpdt bench`: check every stack, measure every length, print the table."""
    for path in (options.csv, options.json):
        if path is not None:
            check_writable(path)
    check_settings()
    with mistakes(LayersDiffer):
        training = training_of(config_of(options, layers=options.layers), lora=False)
    shape = options.shape or DEFAULT_SHAPE
    job = _job(options, shape)
    with mistakes(Unavailable):
        for name in STACKS.keys() & options.stacks:
            STACKS[name].check_gpus(options.gpus)
    with mistakes(FileExistsError):
        files, rows = Files(options.csv, options.json), []
    with Children(options.limit, command_for(options.gpus)) as children:
        measured = Bench(
            job=job,
            stacks=tuple(options.stacks),
            trained=Trained(sizes=training.model, vocabulary=training.vocabulary, full=options.full),
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
    )
