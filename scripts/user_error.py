"""The one exception of these scripts that is the user's to mend: printed as one line, exit code 2, no traceback."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import datasets
import transformers


class UserError(Exception):
    """Says what was asked, what was got, what is allowed and what to do, in one line."""


def one_line(error: BaseException) -> str:
    """Kind and first line of what a library raised, to go into a message of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_with_one_line(error: UserError) -> NoReturn:
    """Print the message on stderr and leave with exit code 2."""
    # Every process of a host finds the same mistake; another host may lack a file that the first one has.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main; a user's mistake ends in one line, a bug in its traceback."""
    # Bars redraw their line: in a file or a pipe they are noise beside the lines the scripts print.
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    # PEFT still asks by the old name of a property; nothing a user of these scripts could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        main()
    except UserError as error:
        exit_with_one_line(error)


def parse_tokens(option: str, text: str) -> int:
    """'8192', '8K', '1M' as a number of tokens; K = 1,024 and M = 1,048,576."""
    units = {"K": 1024, "M": 1024 * 1024}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    if not digits.isdecimal() or int(digits) == 0:
        raise UserError(
            f"{option}: got {text!r}; allowed: a positive whole number of tokens, with or without K or M, as "
            "in 512K or 1M"
        )
    return int(digits) * unit


def tokens_text(tokens: int) -> str:
    """The shortest exact writing of a token count: 8192 -> '8K', 1048576 -> '1M', 8000 -> '8,000'."""
    for unit, name in ((1024 * 1024, "M"), (1024, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"
