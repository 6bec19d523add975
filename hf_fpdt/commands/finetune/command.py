"""`hf-fpdt finetune`: its place among the commands."""

from __future__ import annotations

import argparse

from ..parser import CommandParser, add_command
from .options import add_options, read_options
from .output import words_of_the_run
from .trainer_options import ALIASES

DESCRIPTION = """\
Fine-tune a Hugging Face decoder on long texts, LoRA or full, with exact attention and loss in chunks. Writes to
--output_dir: the adapter or the model with its tokenizer, README.md (the model card), loss_by_position.png and .csv
(held-out loss at each position, before and after), run.json (options, versions, hardware, timing).

Documents are packed whole into windows of --max_length tokens, each closed by an end-of-sequence token; none sees
another one, in attention or in the loss. Longer documents are left out and counted, or cut: --long_documents.
"""
EXAMPLES = """\
Options may be written with underscores or dashes. The command line wins over --config, that over defaults.

examples:
  hf-fpdt finetune --model meta-llama/Llama-3.1-8B --data books/ --max_length 512K --output_dir out/books
  accelerate launch --num_processes 4 -m hf_fpdt.commands.finetune --config run.yaml --sp_size 4
  hf-fpdt finetune --resume --output_dir out/books
"""
USAGE = "%(prog)s --model NAME --data PATH [PATH ...] --output_dir FOLDER [options]"


def add_finetune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `hf-fpdt finetune`."""
    help_line = "adapt a model to long texts: LoRA or full, YaRN, a model card with the loss by position"
    parser = CommandParser(ALIASES, prog="hf-fpdt finetune", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLES)
    add_command(commands, "finetune", parser, help_line)
    parser.set_defaults(run=finetune)
    add_options(parser)
    parser.set_earlier(words_of_the_run)


def finetune(parsed: argparse.Namespace) -> None:
    """`hf-fpdt finetune`: read the options, then do it."""
    from .run import run

    run(read_options(parsed))
