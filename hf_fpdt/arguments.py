"""Values of the command line: what `argparse` calls for them, with errors that say what was expected."""

from __future__ import annotations

import argparse

from .config import parse_tokens


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
