"""What the sub-commands of `hf-fpdt` share: how they read options, and how a user's mistake ends them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from .config import parse_tokens
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


def tokens(text: str) -> int:
    """Of an option: 8192, 32K, 1M."""
    try:
        value = parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"A number of tokens from 1 was expected (8192, 32K, 1M), got {text!r}.")
    return value


def count(text: str) -> int:
    """Of an option: a whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"A whole number from 1 was expected, got {text!r}.")
    return int(text)


def gib(text: str) -> float | str:
    """Of an option: a number of GiB, or "auto"."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"auto" or a number of GiB was expected, got {text!r}.') from None


def amount(text: str) -> float:
    """Of an option: GiB that there are."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0 or value == float("inf"):
        raise argparse.ArgumentTypeError(f"A number of GiB from 0 was expected, got {text!r}.")
    return value


def check_picture(option: str, path: Path) -> None:
    """Before the minutes of a run, not after."""
    if path.suffix not in PICTURE_ENDINGS:
        raise UserMistake(f"{option} {path}: a name that ends in {', '.join(PICTURE_ENDINGS)} is expected.")
    check_writable(path)


def check_writable(path: Path) -> None:
    """As far as folders tell."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserMistake(f"{path} cannot be written: it is a folder, or {path.parent} is none.")
