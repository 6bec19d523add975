"""The process that does one job: `python -m hf_fpdt.commands.bench.child JOB RESULT`, both files of JSON.

It waits for its job before it touches a GPU, and goes with its parent (`lifeline`).

What a user can understand (out of memory, a missing package) is a result, written like any other; everything else ends
the process with a traceback, whose last line the parent shows. Of several processes the first that fails writes the
result, and ends with a status at which the launcher ends the others.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..conditions import conditions_of
from ..options import plain
from .ceiling import measure_ceiling
from .job import Job
from .lifeline import is_wanted
from .parity import check, verdict
from .ranks import World, join, leave, place
from .stacks.base import Unavailable
from .stacks.catalogue import stack_named
from .steps import measure

PACKAGES = ("torch", "transformers", "peft", "flash-attn-4", "liger-kernel", "deepspeed")

# The launcher takes a tenth of one to see that a process is gone, and then ends the others.
LAUNCHER_S = 3.0


def main(job_path: str, result_path: str) -> None:
    """Do the job and write an `Outcome`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _go_first()
    job = Job.read(Path(job_path))
    world = place(job.gpus)
    if world.size > 1:
        sys.excepthook = lambda *error: _fail(Path(result_path), world, *error)
    join(world, job.device)
    found, reason = conditions(job), ""
    try:
        found |= work(job, world)
    except torch.OutOfMemoryError as error:
        reason = f"out of GPU memory: {_first_sentence(error)}"
    except MemoryError as error:
        reason = f"does not fit: {plain(error)}"
    except (Unavailable, NotImplementedError) as error:
        reason = f"cannot run: {plain(error)}"
    except ArithmeticError as error:
        reason = f"wrong, so no speed: {plain(error)}"
    if reason and world.size > 1:
        _write(Path(result_path), found, reason + world.part())
        # Not by way of what waits for others.
        os._exit(1)
    leave(world)
    if world.rank == 0:
        _write(Path(result_path), found, reason)


def _write(path: Path, found: dict[str, Any], reason: str) -> None:
    """Whole or not at all, and not over another process's."""
    own = path.with_name(f"{path.name} {os.getpid()}")
    own.write_text(json.dumps({"found": found, "reason": reason}), encoding="utf-8")
    with suppress(FileExistsError):
        os.link(own, path)
    own.unlink()


def _fail(
    path: Path, world: World, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Ends one of several processes; one that fails because another is gone, the launcher ends before it says so."""
    sys.__excepthook__(kind, error, traceback)
    time.sleep(LAUNCHER_S)
    _write(path, {}, f"failed: {kind.__name__}: {_first_sentence(error)}{world.part()}")
    os._exit(1)


def work(job: Job, world: World) -> dict[str, Any]:
    """What the job asks for."""
    if job.kind == "ceiling":
        return measure_ceiling(job)
    stack = stack_named(job.stack)
    stack.check_gpus(world.size)
    stack.world = world
    if job.kind == "parity":
        parity = check(stack, job)
        return {"passed": parity.passed, "parity": parity.ratio, "verdict": verdict(parity)}
    return measure(stack, job)


def conditions(job: Job) -> dict[str, Any]:
    """Of what machine and what code the numbers are."""
    return {
        "gpu": torch.cuda.get_device_name() if job.device == "cuda" else f"none ({os.cpu_count()} CPU cores)",
        **conditions_of(PACKAGES),
        "gpus": job.gpus,
    }


def _go_first() -> None:
    """Where the host runs out of memory, this process is the one to end, not the one that waits for it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def _first_sentence(error: BaseException) -> str:
    return ". ".join(plain(error).split(". ")[:2])


if __name__ == "__main__" and is_wanted():
    main(*sys.argv[1:])
