"""What a run does is said once, on its main process: kernel, chunk, what is kept and where."""

from __future__ import annotations

import logging

from accelerate import PartialState
from transformers.utils import logging as of_transformers

PACKAGE = __name__.partition(".")[0]


class _ToTerminal(logging.StreamHandler):
    """Lines as they are on stderr; none where the program has handlers of its own, which get them too."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether nobody else shows it."""
        return not logging.getLogger().handlers and bool(super().filter(record))


def say_what_is_done(verbosity: int | None = None) -> None:
    """From now on the package's INFO lines are shown on the main process.

    They are no warnings, so Python would drop them, and transformers' default is to show warnings alone. Whoever has
    set a level for the logger "hf_fpdt", or wants less than warnings of transformers, is left alone.

    Args:
        verbosity: what is wanted of transformers, as a level of logging; None: its own.
    """
    logger = logging.getLogger(PACKAGE)
    quiet = (of_transformers.get_verbosity() if verbosity is None else verbosity) > logging.WARNING
    if quiet or logger.level != logging.NOTSET or not PartialState().is_main_process:
        return
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToTerminal())
