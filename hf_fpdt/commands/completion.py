"""TAB in a shell, by a script written once with `shtab`: asking the package would take seconds of imports a TAB."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

COMPLETION_HELP = """\
TAB completes commands, options and files in new shells after
  bash   hf-fpdt --print-completion bash > ~/.hf-fpdt.bash; echo source ~/.hf-fpdt.bash >> ~/.bashrc
  zsh    hf-fpdt --print-completion zsh > "${fpath[1]}/_hf-fpdt"; rm -f ~/.zcompdump
  tcsh   hf-fpdt --print-completion tcsh > ~/.hf-fpdt.tcsh; echo source ~/.hf-fpdt.tcsh >> ~/.tcshrc
"""


def add_completion(parser: argparse.ArgumentParser) -> None:
    """`--print-completion SHELL`, for all that the parser has by then: whatever is a path completes files."""
    shtab.add_argument_to(parser, "--print-completion", help="print a script that makes TAB work in this shell")
    _mark_paths(parser)


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "model":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command)
