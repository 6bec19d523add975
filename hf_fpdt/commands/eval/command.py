"""`hf-fpdt eval`: the loss by position of a model or an adapter on held-out documents."""

from __future__ import annotations

import argparse
from types import MappingProxyType
from typing import Any

from ..options import UserMistake, count, tokens
from ..parser import CommandParser, add_command
from .options import EvalOptions

DESCRIPTION = """\
Loss at each position of held-out windows: is the far context readable, and is it used? Prints a table and writes
loss_by_position.csv and .png to --output_dir.
"""
EXAMPLES = """\
Options may be written with underscores or dashes; --config FILE.yaml may give them too.

examples:
  hf-fpdt eval --model meta-llama/Llama-3.1-8B --data held_out.jsonl --max_length 64K --output_dir out/stock
  hf-fpdt eval --model out/books --data held_out.jsonl --max_length 64K --output_dir out/eval   an adapter's folder
"""
USAGE = "%(prog)s --model NAME --data PATH [PATH ...] --output_dir FOLDER [options]"
ALIASES = MappingProxyType({"--output_dir": ("--output",), "--data": ("--eval_data", "--eval-data")})


def add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `hf-fpdt eval`."""
    parser = CommandParser(ALIASES, prog="hf-fpdt eval", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLES)
    add_command(commands, "eval", parser, "the loss at each position of held-out documents, of a model or an adapter")
    parser.add_config()
    parser.add_options("what is measured", EvalOptions)
    parser.set_types({"max_length": tokens, "eval_windows": count})
    parser.set_defaults(run=evaluate)


def evaluate(parsed: argparse.Namespace) -> None:
    """`hf-fpdt eval`: measure one model; print the table, write the figure and the csv."""
    from .measure import evaluate_model

    names: dict[str, Any] = {name: getattr(parsed, name) for name in EvalOptions.__dataclass_fields__}
    options = EvalOptions(**names)
    if options.max_length < 2:
        raise UserMistake(f"--max_length: got {options.max_length}; allowed: 2 tokens or more")
    print(*evaluate_model(options), sep="\n")
