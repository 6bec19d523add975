"""What the picture of a plan shows, as numbers: memory over one step, and the longest length by host memory.

Everything is the planner's own: bytes are played as the stores will place them (`Rehearsal`), moments are as far apart
as the operations between them (`chunk_work`), and a step takes the seconds that the plan gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from ..plan import (
    DEVICE_MARGIN,
    DEVICE_RESERVE,
    NO_LIMIT,
    KVBytes,
    Observer,
    Phase,
    Rehearsal,
    StepSizes,
    TierAllocator,
    WorkPhase,
    chunk_work,
    pool_of_numbers,
    spared_operations,
)
from ..units import GIB
from .fit import Machines, PlannedStep, Training, Use
from .searches import longest

# These change while a step goes on; everything else is there throughout.
CHANGING = frozenset({Use.WORKING, Use.KV, Use.CHECKPOINTS})
HOST_STEPS = 6  # lengths are looked for at so many amounts of host memory up to the given one, and as many beyond
LEAST_HOST_GIB = 16


class Moment(NamedTuple):
    """One rank after one chunk of a layer: bytes of checkpoints on device, host and disk, and of K, V on the host."""

    phase: WorkPhase
    layer: int
    chunk: int
    device: int
    host: int
    host_kv: int
    disk: int


@dataclass(frozen=True, kw_only=True)
class MemoryCurve:
    """Memory over one step.

    Attributes:
        seconds: when, from the start of the step.
        backward_from: when the backward pass begins.
        device: GiB of each GPU at these times, by what they are.
        host: GiB of pinned memory in use on all hosts, by what it holds.
        planned_gib: what the plan sets aside on each GPU: every item at its largest.
        pinned_gib: pinned memory of all hosts; it is there from the first such step on.
    """

    seconds: tuple[float, ...]
    backward_from: float
    device: Mapping[Use, tuple[float, ...]]
    host: Mapping[Use, tuple[float, ...]]
    planned_gib: float
    pinned_gib: float


def moments(found: PlannedStep) -> list[Moment]:
    """The step chunk by chunk, as the plan was made."""
    plan, forecast = found.plan, found.plan.forecast
    pool, kv_pool = pool_of_numbers({}, plan.budgets.host), pool_of_numbers({}, NO_LIMIT)
    allocator, seen = TierAllocator(plan.budgets, pool, kv_pool), list[Moment]()

    def look(phase: WorkPhase, layer: int, chunk: int) -> None:
        used = allocator.used
        seen.append(Moment(phase, layer, chunk, used["device"], pool.used_bytes, kv_pool.used_bytes, used["disk"]))

    recorder: Observer = look
    fits = list(
        Rehearsal(forecast.kept, found.step.layer_bytes(forecast.kept.layers), plan.kv, allocator, recorder).play()
    )
    assert all(fits)
    return seen


def memory_curve(found: PlannedStep, *, full: bool) -> MemoryCurve:
    """Memory over the step of a plan.

    Args:
        full: whether every weight trains.
    """
    seen, step, ranks = moments(found), found.step, found.step.plan.sp_size
    first_backward = next(i for i, moment in enumerate(seen) if moment.phase != "forward")
    work = [_work(found, moment, full=full) for moment in seen]
    head = (3 if full else 2) * 2.0 * step.batch * step.plan.n_tokens / ranks * step.vocabulary * step.model.hidden
    work.insert(first_backward, head)
    # While the loss is made, checkpoints lie as the last layer left them.
    seen.insert(first_backward, seen[first_backward - 1])
    phases: list[Phase] = ["loss" if i == first_backward else _row_phase(m.phase) for i, m in enumerate(seen)]
    scale = found.seconds / sum(work)
    seconds = tuple(scale * done for done in accumulate(work))
    working, kv = {phase: _working(step, phase) for phase in set(phases)}, found.plan.kv
    device = {use: [float(size)] * len(seen) for use, size in found.device if use not in CHANGING}
    device[Use.WORKING] = [float(working[phase]) for phase in phases]
    device[Use.KV] = [float(_resident(kv, moment, phase)) for moment, phase in zip(seen, phases, strict=True)]
    device[Use.CHECKPOINTS] = [float(moment.device) for moment in seen]
    weights = {Use.WEIGHTS: [float(found.host_weights)] * len(seen)} if found.host_weights else {}
    host = {
        **weights,
        Use.KV: [float(ranks * m.host_kv) for m in seen],
        Use.CHECKPOINTS: [float(ranks * m.host) for m in seen],
    }
    return MemoryCurve(
        seconds=seconds,
        backward_from=seconds[first_backward],
        device={use: _gib(values) for use, values in device.items()},
        host={use: _gib(values) for use, values in host.items()},
        planned_gib=sum(size for _, size in found.device) / GIB,
        pinned_gib=found.host / GIB,
    )


def _gib(values: list[float]) -> tuple[float, ...]:
    return tuple(value / GIB for value in values)


def _row_phase(phase: WorkPhase) -> Phase:
    return "forward" if phase == "forward" else "backward"


def _work(found: PlannedStep, moment: Moment, *, full: bool) -> float:
    """Operations that led to the moment, as `work.pass_work` counts them."""
    kept = found.plan.kept
    attends = moment.phase == "forward" or not kept.attentions[moment.layer]
    if moment.phase == "backward":
        # What was rebuilt left its attention output.
        below_rebuilt = moment.layer + 1 < kept.layers and not kept.inputs[moment.layer + 1]
        attends = attends and not below_rebuilt
    chunk = found.step.plan.chunks[moment.chunk]
    window = found.step.windows_of_last(kept.layers)[moment.layer]
    done = chunk_work(found.step, chunk, moment.phase, attends=attends, full=full, window=window).done
    again = moment.phase != "forward"
    return done - again * spared_operations(found.step, kept, moment.layer, chunk)


def _working(step: StepSizes, phase: Phase) -> int:
    """What `fit` reckons with for the phase; the plan has the largest of all phases throughout."""
    return int(DEVICE_MARGIN * step.phase_bytes(step.kv_bytes(NO_LIMIT), phase)) + DEVICE_RESERVE


def _resident(kv: KVBytes, moment: Moment, phase: Phase) -> int:
    """K, V, and in backward dK, dV, of one layer on the device; of one with a window the most that it has."""
    if phase == "loss":
        return 0
    backward = moment.phase == "backward"
    if kv.is_windowed(moment.layer):
        return kv.backward_ring if backward else kv.forward_ring
    if backward:
        return kv.resident_parts.backward + kv.resident_parts.grads
    return replace(kv, forward_resident=min(moment.chunk + 1, kv.forward_resident)).resident_parts.forward


class Reach(NamedTuple):
    """The longest sequence (0 where none fits) with so much memory on all hosts together."""

    host_gib: float
    tokens: int


def reach_by_host(training: Training, machines: Machines) -> Iterator[Reach]:
    """The longest sequence by host memory, the given amount among them; everything else stays."""
    unit = max(machines.host_bytes, LEAST_HOST_GIB * GIB) // HOST_STEPS
    amounts = {i * unit for i in range(2 * HOST_STEPS + 1)} | {machines.host_bytes}
    for host_bytes in sorted(amounts):
        best = longest(training, replace(machines, host_bytes=host_bytes))
        yield Reach(host_bytes / GIB, 0 if best is None else best.step.plan.n_tokens)
