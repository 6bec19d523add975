"""The command `hf-fpdt`: each sub-command has one `add_…` for its options and one function that does it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .bench.command import add_bench
from .check.command import add_check
from .completion import COMPLETION_HELP, add_completion
from .conditions import versions_of
from .eval.command import add_eval
from .finetune.command import add_finetune
from .options import exit_status
from .plan.command import add_plan
from .trace.command import add_trace

VERSIONS = (
    *("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes"),
    *("flash-attn-4", "liger-kernel", "flash-linear-attention", "triton"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    0, 1 for a check that failed or where nobody reads on (as `rich` has it), 2 for a mistake of the user's.
    """
    try:
        return exit_status(lambda: _run(arguments))
    except BrokenPipeError:
        # `| head` has seen enough; what Python would still write when it ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int | None:
    options = _parser().parse_args(arguments)
    status: int | None = options.run(options)
    sys.stdout.flush()
    return status


class _Version(argparse.Action):
    """`--version`: what a report of a problem begins with."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        own = import_module("hf_fpdt").__version__  # by name: run as a module, this one is called __main__
        print(f"hf-fpdt {own} ({versions_of(VERSIONS)}, python {platform.python_version()})")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-fpdt",
        description="Tools around FPDT training: exact training of Hugging Face models on very long sequences.",
        epilog=COMPLETION_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show this version and those that matter to it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_check(commands)
    add_plan(commands)
    add_trace(commands)
    add_bench(commands)
    add_finetune(commands)
    add_eval(commands)
    add_completion(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
