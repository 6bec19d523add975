"""Runs a job in a fresh process; whatever becomes of it is an outcome. No torch: the parent holds no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .job import Job, Outcome

CHILD = (sys.executable, "-m", "hf_fpdt.bench.child")
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# What a traceback's last line says at most.
REASON_LENGTH = 300


def run_child(job: Job, limit_s: float, command: tuple[str, ...] = CHILD) -> Outcome:
    """The outcome of a job; never an error of the child's.

    Args:
        job: what to do.
        limit_s: seconds after which the child is ended.
        command: what to start; the paths of job and result follow.
    """
    with TemporaryDirectory() as folder:
        job_path, result_path, log_path = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
        job.write(job_path)
        with log_path.open("wb") as log:
            status = _run([*command, str(job_path), str(result_path)], log.fileno(), limit_s)
        if status is None:
            return Outcome({}, f"over the limit: not done in {limit_s:,.0f} s (--limit)")
        if result_path.exists() and status == 0:
            return Outcome(**json.loads(result_path.read_text(encoding="utf-8")))
        return Outcome({}, _why(status, log_path.read_text(encoding="utf-8", errors="replace")))


def _run(command: list[str], log: int, limit_s: float) -> int | None:
    """The exit status; None where it was ended for taking too long. Nothing of it is left behind."""
    environment = {ALLOCATOR: "expandable_segments:True", **os.environ}
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _why(status: int, log: str) -> str:
    """Of a child without a result."""
    if status == -signal.SIGKILL:
        return "killed (signal 9): the host ran out of memory, most likely"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"failed: {lines[-1][:REASON_LENGTH] if lines else f'exit status {status}'}"
