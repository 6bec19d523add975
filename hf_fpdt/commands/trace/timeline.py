"""What the device did during one decoder layer, read from the trace that torch.profiler writes.

FPDT rests on one thing: while a chunk is computed, the next one's bytes travel. A `Timeline` is the layer's forward or
backward pass as the device lived it, and says how busy the computation was, where it waited, and how much of the
copies it did not cover. `trace_picture.draw` shows the same as a picture.

    for timeline in middle_layer(read_trace("trace.json.gz")):  # of trace_file.py
        print(timeline.summary())

Times are milliseconds from the first device activity of the trace; intervals are pairs (start, end).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from .intervals import Interval, clipped, complement, merged, outside, total

COPY_NAMES = MappingProxyType({"h2d": "host to device", "d2h": "device to host", "peers": "between GPUs"})
KIND_NAMES = MappingProxyType({**COPY_NAMES, "d2d": "inside the device", "memset": "memset"})
PHASE_PREFIXES = ("fpdt::forward ", "fpdt::backward ")  # the layer's name follows
GAP_MS = 0.1
GAPS_SHOWN = 5

# In this order: a flash-attn-4 kernel has "cutlass" in its name too. cuDNN calls a backward kernel bprop.
_ATTENTION = re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE)
_BACKWARD = re.compile(r"bwd|backward|bprop|cutlassB", re.IGNORECASE)
_MATRIX_PRODUCT = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|matmul", re.IGNORECASE)
KERNEL_CLASSES = ("attention forward", "attention backward", "matrix products", "other kernels")


class TraceError(ValueError):
    """A file that is no trace, or a trace that does not hold what is to be shown."""


def kernel_class(name: str) -> str:
    """One of KERNEL_CLASSES, by the kernel's name."""
    if _ATTENTION.search(name):
        return "attention backward" if _BACKWARD.search(name) else "attention forward"
    return "matrix products" if _MATRIX_PRODUCT.search(name) else "other kernels"


# What NCCL was asked for: such as "all_to_allv", and how many elements of this GPU's.
Message = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Activity:
    """One thing the device did.

    Its kind is "kernel", "h2d" or "d2h" (a copy between host and device), "peers" (NCCL's kernels: what GPUs send each
    other, and waiting for one another), "d2d" or "memset".
    """

    kind: str
    name: str
    start_ms: float
    end_ms: float
    stream: int
    n_bytes: int = 0
    correlation: int | None = None  # of the host's call that launched it
    message: Message | None = None  # of "peers"


@dataclass(frozen=True, slots=True)
class Annotation:
    """A `record_function` block: on the host, where `lane` is a thread, or on the device, where it is a stream.

    A block on the host ends when its work is enqueued. The device's reaches from the first of its activities on the
    stream to the last.
    """

    name: str
    start_ms: float
    end_ms: float
    on_device: bool
    lane: object


@dataclass(frozen=True, slots=True)
class Launch:
    """A call of the host that set a device activity going."""

    time_ms: float
    lane: object
    correlation: int


@dataclass(frozen=True, slots=True)
class Phase:
    """One pass through one layer, in the device's time."""

    direction: str  # "forward" or "backward"
    layer: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch without computation: from the pass's start, between which kernels, and the copies under way in it."""

    start_ms: float
    length_ms: float
    before: str
    after: str
    copies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of one direction: GB (1e9 bytes), ms in which at least one ran, ms of those without computation.

    Of what GPUs send each other a trace holds no bytes. NCCL's kernels wait for the GPU that comes last: `waiting_ms`
    is how much longer they took than the shortest of the same size in the trace.
    """

    count: int
    gigabytes: float
    busy_ms: float
    exposed_ms: float
    waiting_ms: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """Bandwidth while copies ran."""
        return 1e3 * self.gigabytes / self.busy_ms if self.busy_ms else 0.0

    @property
    def covered(self) -> float:
        """Part of the copy time that lay under computation; 1 where nothing was copied."""
        return 1 - self.exposed_ms / self.busy_ms if self.busy_ms else 1.0


@dataclass(frozen=True)
class Timeline:
    """One pass through one layer on the device.

    Computation is kernels, of all streams. Copies inside the device and memsets are kept for the picture and count as
    neither computation nor copy. `activities` and `phases` reach a little beyond the pass; every number is of the pass
    alone, and what crosses its edges counts with the part inside.
    """

    phase: Phase
    activities: tuple[Activity, ...]
    phases: tuple[Phase, ...]
    margin: float = 0.0  # how far they reach, in lengths of the pass
    shortest_ms: Mapping[Message, float] = field(default_factory=dict)  # in the whole trace

    @property
    def name(self) -> str:
        """Such as "Forward of layer 3 (LlamaDecoderLayer)"."""
        return f"{self.phase.direction.capitalize()} of {self.phase.layer}"

    @property
    def window(self) -> Interval:
        """Start and end."""
        return self.phase.start_ms, self.phase.end_ms

    @property
    def span_ms(self) -> float:
        """How long the layer took."""
        return self.phase.end_ms - self.phase.start_ms

    @cached_property
    def compute(self) -> list[Interval]:
        """When at least one kernel ran."""
        return self.when("kernel")

    @property
    def busy_ms(self) -> float:
        """How long at least one kernel ran."""
        return total(self.compute)

    @property
    def copy_kinds(self) -> list[str]:
        """What is to be shown: both directions of the host, and other GPUs if there are any."""
        return [kind for kind in COPY_NAMES if kind != "peers" or self.when(kind)]

    def when(self, kind: str) -> list[Interval]:
        """When at least one activity of the kind ran."""
        intervals = ((a.start_ms, a.end_ms) for a in self.activities if a.kind == kind)
        return merged(clipped(intervals, self.window))

    def exposed(self, kind: str) -> list[Interval]:
        """When copies of the direction ran and no kernel did."""
        return outside(self.when(kind), self.compute)

    def copies(self, kind: str) -> Copies:
        """The copies of one direction, "h2d", "d2h" or "peers", in numbers."""
        mine = [a for a in self.activities if a.kind == kind and total(clipped([(a.start_ms, a.end_ms)], self.window))]
        n_bytes = sum(a.n_bytes * self._part_inside(a) for a in mine)
        waiting_ms = sum(self._waiting_ms(a) * self._part_inside(a) for a in mine)
        return Copies(len(mine), n_bytes / 1e9, total(self.when(kind)), total(self.exposed(kind)), waiting_ms)

    def _waiting_ms(self, activity: Activity) -> float:
        took = activity.end_ms - activity.start_ms
        return took - self.shortest_ms.get(activity.message, took) if activity.message else 0.0

    def _part_inside(self, activity: Activity) -> float:
        inside = total(clipped([(activity.start_ms, activity.end_ms)], self.window))
        return inside / (activity.end_ms - activity.start_ms)

    def class_ms(self) -> dict[str, float]:
        """Kernel time by class. Kernels that ran side by side count each, so the sum may be above `busy_ms`."""
        sums: dict[str, float] = defaultdict(float)
        for activity in self.activities:
            if activity.kind == "kernel":
                inside = total(clipped([(activity.start_ms, activity.end_ms)], self.window))
                sums[kernel_class(activity.name)] += inside
        return {name: sums[name] for name in KERNEL_CLASSES if sums[name]}

    def gaps(self, longer_than_ms: float = GAP_MS) -> list[Gap]:
        """Stretches without computation, in order."""
        return [self._gap(gap) for gap in complement(self.compute, self.window) if gap[1] - gap[0] > longer_than_ms]

    def _gap(self, gap: Interval) -> Gap:
        start, end = gap
        kernels = [a for a in self.activities if a.kind == "kernel"]
        before = max((a for a in kernels if a.end_ms <= start), key=lambda a: a.end_ms, default=None)
        after = min((a for a in kernels if a.start_ms >= end), key=lambda a: a.start_ms, default=None)
        names = ["" if a is None else a.name for a in (before, after)]
        running = {a.kind for a in self.activities if a.kind != "kernel" and a.start_ms < end and a.end_ms > start}
        return Gap(start - self.phase.start_ms, end - start, names[0], names[1], tuple(sorted(running)))

    def summary(self, longer_than_ms: float = GAP_MS) -> str:
        """The numbers as a few lines of text."""
        classes = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.class_ms().items())
        lines = [
            f"{self.name}: {self.span_ms:.1f} ms",
            f"  compute         {self.busy_ms:8.1f} ms, busy {self.busy_ms / self.span_ms:.1%} ({classes})",
        ]
        for kind in self.copy_kinds:
            lines.append(f"  {COPY_NAMES[kind]:15} {_copies_text(self.copies(kind))}")
        return "\n".join([*lines, *self._gap_lines(longer_than_ms)])

    def _gap_lines(self, longer_than_ms: float) -> Iterator[str]:
        gaps = sorted(self.gaps(longer_than_ms), key=lambda gap: -gap.length_ms)
        sum_ms = sum(gap.length_ms for gap in gaps)
        yield f"  gaps over {longer_than_ms:g} ms: {len(gaps)}" + (f", {sum_ms:.1f} ms in all" if gaps else "")
        for gap in gaps[:GAPS_SHOWN]:
            during = ", ".join(KIND_NAMES[kind] for kind in gap.copies) or "no copy"
            kernels = f"after {_kernel_text(gap.before)}, before {_kernel_text(gap.after)}"
            yield f"    {gap.length_ms:.2f} ms at {gap.start_ms:.1f} ms, {kernels}; {during} running"


def _kernel_text(name: str) -> str:
    """What most kernels are called says less than their class."""
    return short_name(name) if kernel_class(name) == "other kernels" else kernel_class(name)


def _copies_text(copies: Copies) -> str:
    if not copies.count:
        return "    none"
    size = f", {copies.gigabytes:.2f} GB at {copies.gb_per_s:.1f} GB/s" if copies.gigabytes else ""
    return (
        f"{copies.busy_ms:8.1f} ms{size}; "
        f"{copies.exposed_ms:.2f} ms not covered by computation ({copies.covered:.1%} covered)"
        + (f", {copies.waiting_ms:.2f} ms waiting for another GPU" if copies.waiting_ms else "")
    )


def short_name(kernel: str, length: int = 60) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0].strip() or kernel or "nothing"
    return name if len(name) <= length else name[: length - 1] + "…"


@dataclass(frozen=True)
class Trace:
    """A whole trace, and what the file says of how it was made ("" where it says nothing)."""

    activities: tuple[Activity, ...]
    annotations: tuple[Annotation, ...]
    launches: tuple[Launch, ...]
    title: str = ""
    conditions: str = ""

    @cached_property
    def main_stream(self) -> int:
        """The stream with most kernel time."""
        sums: dict[int, float] = defaultdict(float)
        for activity in self.activities:
            if activity.kind == "kernel":
                sums[activity.stream] += activity.end_ms - activity.start_ms
        return max(sums, key=lambda stream: sums[stream])

    @cached_property
    def phases(self) -> list[Phase]:
        """Every pass through every layer, by its start."""
        names = dict.fromkeys(a.name for a in self.annotations if a.name.startswith(PHASE_PREFIXES))
        found = [
            Phase(direction.removeprefix("fpdt::"), layer, *window)
            for direction, layer in (name.split(" ", 1) for name in names)
            for window in self.device_windows(f"{direction} {layer}")
        ]
        return sorted(found, key=lambda phase: phase.start_ms)

    def device_windows(self, name: str) -> list[Interval]:
        """When the device worked at each block of the name, in order; found by launches if the device has no mark."""
        blocks = [a for a in self.annotations if a.name == name]
        marked = [(a.start_ms, a.end_ms) for a in blocks if a.on_device and a.lane == self.main_stream]
        if marked:
            return sorted(marked)
        launched = (self._launched(block) for block in blocks if not block.on_device)
        return sorted(window for window in launched if window is not None)

    def _launched(self, block: Annotation) -> Interval | None:
        """From the first to the last kernel that the block's thread launched within it."""
        calls = {
            launch.correlation
            for launch in self.launches
            if launch.lane == block.lane and block.start_ms <= launch.time_ms <= block.end_ms
        }
        kernels = [a for a in self.activities if a.kind == "kernel" and a.correlation in calls]
        return (min(a.start_ms for a in kernels), max(a.end_ms for a in kernels)) if kernels else None

    @cached_property
    def shortest_ms(self) -> dict[Message, float]:
        """Of what GPUs sent each other, by size: how long it takes where none waits for another."""
        found: dict[Message, float] = {}
        for activity in self.activities:
            if activity.message is not None:
                took = activity.end_ms - activity.start_ms
                found[activity.message] = min(took, found.get(activity.message, took))
        return found

    def timeline(self, phase: Phase, margin: float = 0.0) -> Timeline:
        """One pass, with what the device did up to `margin` times its length before and after."""
        more = margin * (phase.end_ms - phase.start_ms)
        start, end = phase.start_ms - more, phase.end_ms + more
        activities = tuple(a for a in self.activities if a.start_ms < end and a.end_ms > start)
        phases = tuple(p for p in self.phases if p.start_ms < end and p.end_ms > start)
        return Timeline(phase, activities, phases, margin, self.shortest_ms)


def middle_layer(trace: Trace, margin: float = 0.07) -> list[Timeline]:
    """Forward and backward of the layer in the middle: the first and the last have neighbours of another kind.

    Of several steps the last is taken. A pass that the trace does not hold is left out.

    Raises:
        TraceError: no pass through a layer is marked.
    """
    if not trace.phases:
        raise TraceError(
            "no layer is marked in the trace: it has no 'fpdt::forward …' block with kernels in it. Record a step "
            "of a model to which FPDT is applied."
        )
    layers = list(dict.fromkeys(phase.layer for phase in trace.phases))
    middle = layers[len(layers) // 2]
    last = {phase.direction: phase for phase in trace.phases if phase.layer == middle}
    return [trace.timeline(last[direction], margin) for direction in ("forward", "backward") if direction in last]
