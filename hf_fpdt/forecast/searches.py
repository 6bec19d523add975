"""The longest sequence that fits given machines, the least host memory for a length, and what would help.

Each is a search over `fit`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum

from ..plan import NO_LIMIT
from ..units import GIB
from .fit import Machines, PlannedStep, Training, fit, machine_bytes

# Lengths are looked for in steps of this many tokens.
STEP_TOKENS = 16_384
MOST_TOKENS = 2**27


class More(Enum):
    """What would make the longest sequence longer; values as those of `Use`."""

    HOST_MEMORY = "a quarter more host memory"
    GPU_MEMORY = "a quarter more GPU memory"
    GPUS = "twice the GPUs and hosts"


def longest(training: Training, machines: Machines) -> PlannedStep | None:
    """The longest sequence that fits, in steps of 16K tokens; None where not even one does."""

    def fits(units: int) -> PlannedStep | None:
        try:
            return fit(training, machines, units * STEP_TOKENS)
        except MemoryError:
            return None

    found, low, high = None, 0, 1
    while (longer := fits(high)) is not None and high * STEP_TOKENS < MOST_TOKENS:
        found, low, high = longer, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = fits(middle)
        found, low, high = (found, low, middle) if at_middle is None else (at_middle, middle, high)
    return found


def host_needed(training: Training, machines: Machines, n_tokens: int) -> tuple[PlannedStep, PlannedStep]:
    """(with the least host memory that takes `n_tokens`, with as much as keeps all but linears' outputs), to a GiB.

    `PlannedStep.host` is what is pinned; `machine_bytes` says what machines must have for it.

    Raises:
        MemoryError: no host memory is enough; the message has the arithmetic.
    """

    def with_gib(gib: int) -> PlannedStep | None:
        try:
            return fit(training, replace(machines, host_bytes=gib * GIB), n_tokens)
        except MemoryError:
            return None

    without = replace(training, checkpoints="attention" if training.checkpoints == "auto" else training.checkpoints)
    most = fit(without, replace(machines, host_bytes=2 * NO_LIMIT), n_tokens)
    low, high, least = -1, math.ceil(machine_bytes(most.host) / GIB), most
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = with_gib(middle)
        low, high, least = (middle, high, least) if at_middle is None else (low, middle, at_middle)
    return least, most


def what_would_help(training: Training, machines: Machines) -> dict[More, int]:
    """Longest sequences with a quarter more of one thing: host memory, memory of a GPU; and with twice the GPUs."""
    gpu = machines.gpu
    more = {
        More.HOST_MEMORY: replace(machines, host_bytes=machines.host_bytes * 5 // 4),
        More.GPU_MEMORY: replace(machines, gpu=replace(gpu, memory_gib=1.25 * gpu.memory_gib)),
    }
    if training.model.q_heads % (2 * machines.gpus) == 0:
        more[More.GPUS] = replace(
            machines, gpus=2 * machines.gpus, host_bytes=2 * machines.host_bytes, disk_bytes=2 * machines.disk_bytes
        )
    found = {what: longest(training, other) for what, other in more.items()}
    return {what: 0 if best is None else best.step.plan.n_tokens for what, best in found.items()}
