"""The process that does one job: `python -m hf_fpdt.bench.child JOB RESULT`, both files of JSON.

It waits for a byte on its standard input before it reads the job or touches a GPU. Where the input ends, the parent is
gone, and it goes too, with all that it started: nothing else may find the GPU busy.

What a user can understand (out of memory, a missing package) is a result, written like any other; everything else ends
the process with a traceback, whose last line the parent shows.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch

from ..offload import GIB
from ..versions import commit, versions_of
from .catalogue import stack_named
from .ceiling import measure_ceiling
from .job import Job
from .measure import measure
from .parity import check
from .stack import Unavailable

PACKAGES = ("torch", "transformers", "peft", "flash-attn-4", "liger-kernel", "deepspeed")


def main(job_path: str, result_path: str) -> None:
    """Do the job and write an `Outcome`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _go_first()
    job = Job.read(Path(job_path))
    found, reason = conditions(job), ""
    try:
        found |= work(job)
    except torch.OutOfMemoryError as error:
        reason = f"out of GPU memory: {_first_sentence(error)}"
    except MemoryError as error:
        reason = f"does not fit: {_one_line(error)}"
    except (Unavailable, NotImplementedError) as error:
        reason = f"cannot run: {_one_line(error)}"
    except ArithmeticError as error:
        reason = f"wrong, so no speed: {_one_line(error)}"
    Path(result_path).write_text(json.dumps({"found": found, "reason": reason}), encoding="utf-8")


def work(job: Job) -> dict[str, Any]:
    """What the job asks for."""
    if job.kind == "ceiling":
        return measure_ceiling(job)
    stack = stack_named(job.stack)
    if job.kind == "parity":
        parity = check(stack, job)
        return {"passed": parity.passed, "parity": parity.ratio, "verdict": str(parity)}
    return measure(stack, job)


def conditions(job: Job) -> dict[str, Any]:
    """Of what machine and what code the numbers are."""
    return {
        "gpu": torch.cuda.get_device_name() if job.device == "cuda" else f"none ({os.cpu_count()} CPU cores)",
        "host_memory_gib": round(psutil.virtual_memory().total / GIB),
        "versions": f"{versions_of(PACKAGES)}, python {platform.python_version()}",
        "commit": commit(),
        "date": str(date.today()),
    }


def _go_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


def _go_first() -> None:
    """Where the host runs out of memory, this process is the one to end, not the one that waits for it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_sentence(error: BaseException) -> str:
    return ". ".join(_one_line(error).split(". ")[:2])


if __name__ == "__main__" and os.read(sys.stdin.fileno(), 1):
    Thread(target=_go_with_parent, daemon=True).start()
    main(*sys.argv[1:])
