"""Options that several commands take, and mistakes in them that end a command in one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..config import FPDTPlugin, parse_tokens
from ..forecast import Corpus
from ..model import SHAPES, build_random, with_layers


def tokens(text: str) -> int:
    """A length: 8192, 32K, 1M."""
    try:
        number = parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"A number of tokens from 1 was expected (8192, 32K, 1M), got {text!r}.")
    return number


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"A whole number from 1 was expected, got {text!r}.")
    return int(text)


def gib(text: str) -> float | str:
    """A number of GiB, or "auto"."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"auto" or a number of GiB was expected, got {text!r}.') from None


def amount(text: str) -> float:
    """A number of GiB from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0 or value == float("inf"):
        raise argparse.ArgumentTypeError(f"A number of GiB from 0 was expected, got {text!r}.")
    return value


def tokens_text(tokens: int) -> str:
    """The shortest exact writing of a token count: 8192 -> "8K", 1048576 -> "1M", 8000 -> "8,000"."""
    for unit, name in ((1024 * 1024, "M"), (1024, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


DEFAULT_SHAPE = "llama-8b"
ADAPTER_CONFIG = "adapter_config.json"
# What a model's own constructor raises of a configuration that it does not understand.
_OF_CONSTRUCTORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
PICTURE_ENDINGS = (".png", ".svg", ".pdf")


class UserMistake(Exception):
    """Ends the command with its message and exit status 2, without a traceback."""


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """What is raised in here of these kinds says what the user can mend."""
    try:
        yield
    except kinds as error:
        raise UserMistake(plain(error)) from error


def plain(error: BaseException) -> str:
    """What it says, in one line, without the package's name before it: a command has its own."""
    return " ".join(str(error).split()).removeprefix("hf_fpdt: ")


def check_settings() -> None:
    """What FPDT_* variables say can be read; before anything runs."""
    with mistakes(ValueError):
        FPDTPlugin()


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


def new_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int | None],
    *,
    about: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """The parser of the sub-command that is called as the function that does it; texts keep their lines."""
    parser = commands.add_parser(
        run.__name__,
        help=about,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(
    group: argparse._MutuallyExclusiveGroup, about: str = "hub name or folder whose configuration is taken"
) -> None:
    """MODEL or --shape, as `config_of` reads them."""
    group.add_argument("model", nargs="?", metavar="MODEL", help=about)
    known = ", ".join(SHAPES)
    group.add_argument(
        "--shape",
        choices=list(SHAPES),
        metavar="SHAPE",
        help=f"a known model's sizes: {known} (default: {DEFAULT_SHAPE})",
    )


def corpus_of(text: str) -> Corpus:
    """The documents of --documents: lognormal:MEAN,SIGMA, or a JSON file with a list of lengths."""
    how = f"--documents {text}: lognormal:MEAN,SIGMA (as in lognormal:8K,1.2) or a JSON file with a list of lengths"
    try:
        if text.startswith("lognormal:"):
            mean, _, sigma = text.removeprefix("lognormal:").partition(",")
            return Corpus(mean=parse_tokens(mean), sigma=float(sigma or "1"))
        lengths = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
            raise UserMistake(f"{how} is expected; the file holds no list of whole numbers.")
        return Corpus(lengths=tuple(lengths))
    except (OSError, ValueError) as error:
        raise UserMistake(f"{how} is expected ({plain(error)}).") from error


def config_of(options: argparse.Namespace, *, layers: int | None) -> PreTrainedConfig:
    """Of MODEL or --shape, with that many layers, or its own."""
    if options.model is None:
        config = SHAPES[options.shape or DEFAULT_SHAPE]()
        return config if layers is None else with_layers(config, layers)
    config = read_config(options.model)
    return config if layers is None else with_layers(config, layers)


def read_config(model: str) -> PreTrainedConfig:
    """Of a hub name or a folder.

    Raises:
        UserMistake: it is not there, cannot be read, or is of no causal language model.
    """
    check_folder(model)
    _refuse_bare_adapter(Path(model))
    with mistakes(OSError, ValueError, StrictDataclassError):
        config = _config_of(model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserMistake(f"{model} is a {config.model_type} model; a causal language model is expected.")
    return config


def _refuse_bare_adapter(folder: Path) -> None:
    """An adapter's folder with the configuration of its base in it is taken for the base."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise UserMistake(
            f"{folder} is a PEFT adapter's folder and holds no configuration of a model; give its base, or ask "
            f"hf-fpdt check {folder}."
        )


def _config_of(model: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise OSError(f"{plain(error).rstrip('.')}{no_folder_either(model)}.") from error
    return config


def check_folder(model: str) -> None:
    """Refuse what can only be a folder, and is none; transformers would look for it on the hub."""
    path = Path(model)
    a_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    if path.is_file() or (a_path and not path.is_dir()):
        why = "is a file" if path.is_file() else "is not there"
        raise UserMistake(
            f"{model}: there is no such folder, it {why}; give a model's folder, or its name on the hub."
        )


def no_folder_either(model: str) -> str:
    """To end a message about a name that the hub did not give: it may have been meant as a folder."""
    return "" if Path(model).is_dir() else f"; there is no folder {model} here either"


def built_without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, every weight trained, without memory for one; for questions about it."""
    try:
        return build_random(config, "meta", torch.bfloat16, False)
    except _OF_CONSTRUCTORS as error:
        why = " ".join(str(error).split())
        raise UserMistake(
            f"transformers makes no causal language model of this {type(config).__name__}: {why}"
        ) from error


def check_picture(option: str, path: Path) -> None:
    """Before the minutes of a run, not after."""
    if path.suffix not in PICTURE_ENDINGS:
        raise UserMistake(f"{option} {path}: a name that ends in {', '.join(PICTURE_ENDINGS)} is expected.")
    check_writable(path)


def check_writable(path: Path) -> None:
    """As far as folders tell."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserMistake(f"{path} cannot be written: it is a folder, or {path.parent} is none.")
