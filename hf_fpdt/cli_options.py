"""What the sub-commands of `hf-fpdt` share: how they read options, and how a user's mistake ends them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from .shapes import SHAPES, with_layers

DEFAULT_SHAPE = "llama-8b"
PICTURE_ENDINGS = (".png", ".svg", ".pdf")


class UserMistake(Exception):
    """Ends the command with its message and exit status 2, without a traceback."""


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """What is raised in here of these kinds says what the user can mend."""
    try:
        yield
    except kinds as error:
        raise UserMistake(" ".join(str(error).split())) from error


def one_line(error: BaseException) -> str:
    """Kind and first line of what a library raised, to go into a message of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_status(command: Callable[[], int | None]) -> int:
    """Of a command; a user's mistake ends it with one line on stderr and status 2, a bug with its traceback."""
    try:
        return command() or 0
    except UserMistake as mistake:
        # Every process of a host finds the same mistake; another host may lack a file that the first one has.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2


def add_model(group: argparse._MutuallyExclusiveGroup) -> None:
    """MODEL or --shape, as `config_of` reads them."""
    group.add_argument("model", nargs="?", metavar="MODEL", help="hub name or folder whose configuration is taken")
    group.add_argument("--shape", choices=list(SHAPES), help=f"a known model's sizes (default: {DEFAULT_SHAPE})")


def config_of(options: argparse.Namespace, *, layers: int | None) -> PreTrainedConfig:
    """Of MODEL or --shape, with that many layers, or its own."""
    if options.model is None:
        config = SHAPES[options.shape or DEFAULT_SHAPE]()
        return config if layers is None else with_layers(config, layers)
    with mistakes(OSError, ValueError):
        config = AutoConfig.from_pretrained(options.model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserMistake(f"{options.model} is a {config.model_type} model; a causal language model is expected.")
    return config if layers is None else with_layers(config, layers)


def check_picture(option: str, path: Path) -> None:
    """Before the minutes of a run, not after."""
    if path.suffix not in PICTURE_ENDINGS:
        raise UserMistake(f"{option} {path}: a name that ends in {', '.join(PICTURE_ENDINGS)} is expected.")
    check_writable(path)


def check_writable(path: Path) -> None:
    """As far as folders tell."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserMistake(f"{path} cannot be written: it is a folder, or {path.parent} is none.")
