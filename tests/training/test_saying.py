"""What a run does is shown once, without any setting of the user's; `test_examples.py` shows it on real runs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerate import PartialState
from transformers.utils import logging as of_transformers

from hf_fpdt.training import say_what_is_done
from tests.helpers.support import assert_rejects

OURS, ROOT = logging.getLogger("hf_fpdt"), logging.getLogger()
LINE = "hf_fpdt: a line"


@contextmanager
def terminal() -> Iterator[io.StringIO]:
    """What is shown, of loggers as Python makes them: pytest's own handlers are away."""
    PartialState(cpu=True)
    before = [(logger, logger.level, logger.handlers) for logger in (OURS, ROOT)]
    for logger, level in ((OURS, logging.NOTSET), (ROOT, logging.WARNING)):
        logger.handlers = []
        logger.setLevel(level)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", shown := io.StringIO())
            yield shown
    finally:
        for logger, level, handlers in before:
            logger.handlers = handlers
            logger.setLevel(level)


def say(text: str = LINE) -> None:
    logging.getLogger("hf_fpdt.model.apply").info(text)


def test_lines_are_shown_once() -> None:
    with terminal() as shown:
        say("before")
        for _ in range(2):
            say_what_is_done()
        say()
        assert shown.getvalue() == f"{LINE}\n"


def test_a_programs_own_handler_shows_them_alone() -> None:
    with terminal() as shown:
        say_what_is_done()
        logging.basicConfig(stream=shown, format="mine %(message)s")
        say()
        assert shown.getvalue() == f"mine {LINE}\n"


def test_who_wants_less_and_other_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: str) -> None:
        with terminal() as shown, monkeypatch.context() as patch:
            if case == "transformers shows errors alone":
                patch.setattr(of_transformers, "get_verbosity", lambda: logging.ERROR)
            if case == "a level of the program's":
                OURS.setLevel(logging.WARNING)
            if case == "another process":
                patch.setattr(PartialState, "is_main_process", False)
            say_what_is_done()
            say()
            assert shown.getvalue() == ""

    for case in ("transformers shows errors alone", "a level of the program's", "another process"):
        check(case)
    assert_rejects(check, {"none of them": "as ever"})
