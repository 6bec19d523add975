"""Programs started by tests: one that hangs says where it hangs, process by process, instead of that it took long."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
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
    """Abort a program and all that it started, the youngest last; what they printed until then."""
    every = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
    for process in every:
        process.send_signal(signal.SIGABRT)
    psutil.wait_procs(every[1:], timeout=10)
    for process in every:
        if process.is_running():
            process.kill()
    return program.communicate()
