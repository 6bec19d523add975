"""Programs started by tests: one that hangs says where it hangs, process by process, instead of that it took long."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

# Long enough where others use the same cores; before pytest's own limit, which says nothing of other processes.
LIMIT_S = 480


def run_or_tell(
    command: list[str], *, environment: Mapping[str, str], timeout_s: float = LIMIT_S, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with both outputs captured; after `timeout_s` seconds every process prints its stacks.

    Raises:
        AssertionError: it did not end in time; with what was printed, the Python stacks of each process at the end.
    """
    pipe = subprocess.PIPE
    # Python prints the stacks of all threads when it is aborted.
    told = {**environment, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=told, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as program:
        try:
            out, errors = program.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            out, errors = _aborted(program)
            raise AssertionError(f"no end within {timeout_s} s: {command}\n{out}\n{errors}") from None
        return subprocess.CompletedProcess(command, program.returncode, out, errors)


def _aborted(program: subprocess.Popen[str]) -> tuple[str, str]:
    """Abort a program and all that it started, the youngest last; what they printed until then.

    One after the other, the rest stopped meanwhile: they write to the same pipe, and end where their parent does.
    """
    every = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in every:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
            process.resume()
            _wait_for_end(process)
    return program.communicate()


def _wait_for_end(process: psutil.Process, seconds: float = 10) -> None:
    """Until it has written its stacks and ended, whoever asks for its status; killed where it does not end."""
    until = time.monotonic() + seconds
    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
