"""Runs jobs, each in a fresh process; whatever becomes of one is an outcome. No torch: the parent holds no GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, TracebackType

import psutil

from .job import Job, Outcome

CHILD = (sys.executable, "-m", "hf_fpdt.commands.bench.child")
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
# A child may use these or not. Kernels of flash-attn-4 that one child compiled are the next one's too.
ENVIRONMENT = MappingProxyType(
    {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}
)
OVER_THE_LIMIT = "over the limit"
# What a traceback's last line says at most.
REASON_LENGTH = 300
# What torch's launcher says of the process that ended first; what it says before processes do, and after.
FIRST_ENDED = re.compile(r"Root Cause \(first observed failure\).*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)
LAUNCHER_WARNS = re.compile(r"\A.*^\*+$", re.DOTALL | re.MULTILINE)
LAUNCHER_TELLS = re.compile(r"^.*torch/distributed/elastic.*\Z", re.DOTALL | re.MULTILINE)
ENDING_S = 60


def command_for(gpus: int) -> tuple[str, ...]:
    """What does jobs on so many GPUs: a child, or torch's launcher with a child for each."""
    if gpus == 1:
        return CHILD
    return (*LAUNCHER, "--nproc-per-node", str(gpus), *CHILD[1:])


class Children:
    """Runs one job after another, each in a process of its own.

    On a GPU the next process starts while this one works, and waits: importing takes longer than many a step. Leave
    the context to end it.

    Args:
        limit_s: seconds after which a job is ended.
        command: what to start; the paths of job and result follow, and a line on standard input says that the job is
            there.
    """

    def __init__(self, limit_s: float, command: tuple[str, ...] = CHILD) -> None:
        self._limit_s, self._command = limit_s, command
        self._next: _Child | None = None

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._next.end()
            self._next = None

    def run(self, job: Job) -> Outcome:
        """The outcome of a job; never an error of the child's."""
        child = self._next or _Child(self._command)
        # A CPU is what is measured where there is no GPU, so nothing else may use it then.
        self._next = _Child(self._command) if job.device == "cuda" else None
        try:
            return child.work(job, self._limit_s)
        finally:
            child.end()


class _Child:
    """A process that waits for its job."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._folder = TemporaryDirectory()
        self._job, self._result, self._log = (Path(self._folder.name) / name for name in ("job", "result", "log"))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(self._job), str(self._result)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**ENVIRONMENT, **os.environ},
                start_new_session=True,
            )

    def work(self, job: Job, limit_s: float) -> Outcome:
        """What becomes of the job."""
        job.write(self._job)
        try:
            self._say_so()
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Outcome({}, f"{OVER_THE_LIMIT}: not done in {limit_s:,.0f} s (--limit)")
        if self._result.exists():
            outcome = Outcome(**json.loads(self._result.read_text(encoding="utf-8")))
            # One of several processes that says why it failed ends the others, and so the launcher, with a status.
            if status == 0 or outcome.reason:
                return outcome
        return Outcome({}, _why(status, self._log.read_text(encoding="utf-8", errors="replace")))

    def _say_so(self) -> None:
        """The pipe stays open: where it closes, this process is gone, and a child that works on a GPU must go too."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Nothing of it is left behind, whatever it does; torch's launcher gives each process its own session."""
        if self._process.poll() is None:
            family = psutil.Process(self._process.pid).children(recursive=True)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _end_all(family)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._folder.cleanup()


def _end_all(processes: list[psutil.Process]) -> None:
    """They are gone then, with the GPU memory they had."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    until = time.monotonic() + ENDING_S
    while any(map(_works, processes)) and time.monotonic() < until:
        time.sleep(0.02)


def _works(process: psutil.Process) -> bool:
    """Not so one that has ended and that nobody has asked yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _why(status: int, log: str) -> str:
    """Of a child without a result."""
    first = FIRST_ENDED.search(log)
    if first is not None:
        of_ranks = LAUNCHER_TELLS.sub("", LAUNCHER_WARNS.sub("", log))
        return f"{_why(int(first[2]), of_ranks)} (rank {first[1]})"
    if status == -signal.SIGKILL:
        return "killed (signal 9): the host ran out of memory, most likely"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"failed: {lines[-1][:REASON_LENGTH] if lines else f'exit status {status}'}"
