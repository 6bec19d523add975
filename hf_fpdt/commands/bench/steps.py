"""Steps of one stack at one length, and what they took of time and memory."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...units import GIB
from .ceiling import finish
from .job import Job
from .models import config_of, model_of, packed_row, tokens_of, without_first_tokens
from .stacks.base import Pieces, Stack

LEARNING_RATE = 1e-5


def measure(stack: Stack, job: Job) -> dict[str, Any]:
    """Columns of a row: seconds of a step, the loss, peaks of memory; every process of the job must call it.

    Raises:
        Unavailable: the stack cannot run here.
        torch.OutOfMemoryError, MemoryError: the step does not fit.
    """
    held = torch.empty(int(job.held_gib * GIB), dtype=torch.uint8, device=job.device)  # until the last step is over
    config = config_of(job)
    model = model_of(job, config)
    pieces = Pieces(chunk_tokens=job.chunk_tokens)
    stack.prepare(model, pieces)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=job.device == "cuda"
    )
    spread, optimizer = stack.spread(model, optimizer)
    steps = Steps(stack, spread, optimizer, job)
    steps.run(tokens_of(job, config, min(job.n_tokens, stack.warm_up_tokens(pieces))))
    steps.forget()
    for number in range(job.steps):
        steps.run(tokens_of(job, config, job.n_tokens, number))
    del held
    return together(stack.world.gather(steps.row())) | stack.predicted(model, job.n_tokens)


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of those of all processes: the slowest and the fullest GPU, host memory of all.

    No more than what every process pinned is taken off a step: meanwhile the others may have waited for one.
    """
    pinning = [min(each) for each in zip(*(row["pinnings_s"] for row in rows), strict=True)]
    took = [max(each) for each in zip(*(row["took_s"] for row in rows), strict=True)]
    seconds = [whole - pinned for whole, pinned in zip(took, pinning, strict=True)]
    peaks = [row["peak_device_gib"] for row in rows if row["peak_device_gib"] is not None]
    return {
        "step_s": statistics.median(seconds[1:] or seconds),
        "steps_s": [round(each, 3) for each in seconds],
        "pinning_s": sum(pinning),
        "loss": rows[0]["loss"],
        "peak_device_gib": max(peaks, default=None),
        **{name: sum(row[name] for row in rows) for name in ("pinned_host_gib", "peak_rss_gib")},
    }


class Steps:
    """Steps that were run, and what they took."""

    def __init__(self, stack: Stack, model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> None:
        self._stack, self._model, self._optimizer = stack, model, optimizer
        self._device, self._job = torch.device(job.device), job
        self.forget()

    def forget(self) -> None:
        """Begin again: what was run so far was to warm up."""
        self._took: list[float] = []
        self._pinning: list[float] = []
        self._loss = math.nan
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def run(self, ids_BS: torch.Tensor) -> None:
        """Forward, loss, backward and optimizer; host memory that is pinned meanwhile is timed apart."""
        self._stack.packed = packed_row(self._job, ids_BS)
        labels_BS = without_first_tokens(ids_BS, self._stack.packed)
        pinned = self._stack.pinned()[1]
        finish(self._device)
        self._stack.world.meet()
        began = time.perf_counter()
        loss = self._stack.loss_and_backward(self._model, ids_BS, labels_BS)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        finish(self._device)
        took = time.perf_counter() - began
        self._loss = loss.item()
        if not math.isfinite(self._loss):
            raise ArithmeticError(f"the loss is {self._loss}.")
        self._pinning.append(self._stack.pinned()[1] - pinned)
        self._took.append(took)

    def row(self) -> dict[str, Any]:
        """What this process's steps took, and its peaks."""
        on_gpu = self._device.type == "cuda"
        return {
            "took_s": self._took,
            "pinnings_s": self._pinning,
            "loss": self._loss,
            "peak_device_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            "pinned_host_gib": self._stack.pinned()[0] / GIB,
            # Linux counts it in KiB.
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
