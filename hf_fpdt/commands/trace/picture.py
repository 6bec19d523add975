"""The picture of a trace: for each pass through a layer rows "compute", "host to device", "device to host", and
"between GPUs" where there are several.

Each row is drawn a column of pixels at a time: what filled most of the column gives its colour. So any number of
kernels makes a small picture, and none that is too short to be seen hides a longer one. Numbers and gap marks come
from the timeline, never from the pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..pictures import check_matplotlib
from .intervals import Interval, merged, outside
from .timeline import COPY_NAMES, GAP_MS, KERNEL_CLASSES, Copies, Gap, Phase, Timeline, kernel_class

INSIDE = "copies inside the device"
# Of Okabe and Ito's colours, which colour-blind readers tell apart; their orange-red is kept for what is to be
# corrected.
COLOURS = MappingProxyType(
    {
        "attention forward": "#0072B2",
        "attention backward": "#56B4E9",
        "matrix products": "#009E73",
        "other kernels": "#E8C547",
        INSIDE: "#A9AFB7",
        "copy under computation": "#8C7BB8",
        "copy without computation": "#D55E00",
    }
)
INK, MUTED, RULE, EMPTY = "#1A1A1A", "#5A5F66", "#9AA0A8", "#F1F3F5"
# Bottom and height.
ROWS = MappingProxyType({"compute": (1.75, 1.0), "h2d": (0.9, 0.6), "d2h": (0.0, 0.6), "peers": (-0.9, 0.6)})
# A column filled less stays empty.
FLOORS = MappingProxyType({"compute": 0.5, "h2d": 0.02, "d2h": 0.02, "peers": 0.02})
STRIP = (3.1, 0.3)  # the passes' names
TOP = 3.5
COLUMNS = 1459  # pixels of the axes at DPI
DPI = 160
WIDTH_IN, PANEL_IN, BETWEEN_IN, HEAD_IN, FOOT_IN = 12.0, 2.1, 1.2, 1.45, 1.0
GAPS_MARKED, GAPS_NAMED = 60, 3
CAPTION_LETTERS = 185
NOTABLE = 0.01  # of the pass: copies that stand out of computation for longer are written in the warning colour


def draw(timelines: Sequence[Timeline], path: str | Path, title: str, conditions: str = "") -> None:
    """Write a picture with one panel for each pass, each with its own time axis.

    Args:
        timelines: passes through a layer, as `middle_layer` finds them.
        path: file to write; its ending says the format (.png, .svg, .pdf).
        title: what was run, in a line.
        conditions: GPU, lengths, versions, commit, date: the caption.

    Raises:
        PictureError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    n = len(timelines)
    height = HEAD_IN + n * PANEL_IN + (n - 1) * BETWEEN_IN + FOOT_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    panels = figure.subplots(n, 1, squeeze=False)[:, 0]
    figure.subplots_adjust(0.105, FOOT_IN / height, 0.865, 1 - HEAD_IN / height, hspace=BETWEEN_IN / PANEL_IN)
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw_panel(axes, timeline)
    figure.text(0.012, 1 - 0.28 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    _legend(figure, timelines, 1 - 0.62 / height)
    caption = "\n".join(textwrap.wrap(conditions, CAPTION_LETTERS))
    figure.text(0.012, 0.1 / height, caption, fontsize=7.5, color=MUTED, va="bottom", linespacing=1.4)
    figure.savefig(path)


def _legend(figure: Figure, timelines: Sequence[Timeline], y: float) -> None:
    """The colours that occur, and the mark of a gap."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {name for timeline in timelines for classes in _rows(timeline).values() for name in classes}
    handles: list[Patch | Line2D] = [Patch(color=COLOURS[name], label=name) for name in COLOURS if name in used]
    if any(timeline.gaps() for timeline in timelines):
        colour = COLOURS["copy without computation"]
        handles.append(Line2D([], [], color=colour, marker="v", markersize=5, linestyle="", label="gap in compute"))
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(0.006, y),
        ncols=len(handles),
        frameon=False,
        fontsize=8.2,
        handlelength=1.0,
        handleheight=0.9,
        handletextpad=0.6,
        columnspacing=1.3,
    )


# What fills a row ----------------------------------------------------------------------------------------------------


def _rows(timeline: Timeline) -> dict[str, dict[str, list[Interval]]]:
    """By row, then by the name of a colour: disjoint intervals, in the trace's time."""
    by_name: dict[str, list[Interval]] = {name: [] for name in (*KERNEL_CLASSES, *COPY_NAMES, INSIDE)}
    for a in timeline.activities:
        name = kernel_class(a.name) if a.kind == "kernel" else a.kind if a.kind in COPY_NAMES else INSIDE
        by_name[name].append((a.start_ms, a.end_ms))
    times = {name: merged(intervals) for name, intervals in by_name.items()}
    computing = merged(interval for name in KERNEL_CLASSES for interval in times[name])
    rows = {"compute": {name: times[name] for name in KERNEL_CLASSES} | {INSIDE: times[INSIDE]}}
    for kind in timeline.copy_kinds:
        exposed = outside(times[kind], computing)
        covered = outside(times[kind], exposed)
        rows[kind] = {"copy under computation": covered, "copy without computation": exposed}
    return {row: {name: found for name, found in parts.items() if found} for row, parts in rows.items()}


def _runs(parts: Mapping[str, Sequence[Interval]], shown: Interval, floor: float) -> dict[str, list[Interval]]:
    """By the name of a colour: stretches of columns where it fills most."""
    if not parts:
        return {}
    edges = np.linspace(*shown, COLUMNS + 1)
    filled = np.stack([_filled(intervals, edges) for intervals in parts.values()]) / (edges[1] - edges[0])
    winner = np.where(filled.sum(axis=0) >= floor, filled.argmax(axis=0), -1)
    return {name: _stretches(winner == number, edges) for number, name in enumerate(parts)}


def _filled(intervals: Sequence[Interval], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each column the disjoint intervals fill, in the unit of the edges."""
    flat = np.array(intervals).ravel()
    lengths = np.zeros(len(flat))
    lengths[1::2] = flat[1::2] - flat[::2]
    return np.diff(np.interp(edges, flat, np.cumsum(lengths)))


def _stretches(mask: NDArray[np.bool_], edges: NDArray[np.float64]) -> list[Interval]:
    steps = np.diff(mask.astype(int), prepend=0, append=0)
    return list(zip(edges[steps == 1].tolist(), edges[steps == -1].tolist(), strict=True))


# One panel -----------------------------------------------------------------------------------------------------------


def _draw_panel(axes: Axes, timeline: Timeline) -> None:
    shown, zero = _shown(timeline), timeline.phase.start_ms
    for row, parts in _rows(timeline).items():
        axes.broken_barh([(shown[0] - zero, shown[1] - shown[0])], ROWS[row], facecolors=EMPTY, linewidth=0)
        for name, runs in _runs(parts, shown, FLOORS[row]).items():
            bars = [(start - zero, end - start) for start, end in runs]
            # Edges between columns are not smoothed: thin bars would grow pale.
            axes.broken_barh(bars, ROWS[row], facecolors=COLOURS[name], linewidth=0, antialiased=False, zorder=2)
    _frame(axes, timeline, (shown[0] - zero, shown[1] - zero))
    for phase in timeline.phases:
        _name_phase(axes, phase, timeline, shown)
    _mark_gaps(axes, timeline.gaps(), timeline.span_ms)
    _write_numbers(axes, timeline)


def _shown(timeline: Timeline) -> Interval:
    """The pass, and what of its neighbours the timeline holds."""
    (start, end), more = timeline.window, timeline.margin * timeline.span_ms
    first = min(a.start_ms for a in timeline.activities)
    last = max(a.end_ms for a in timeline.activities)
    return max(start - more, min(first, start)), min(end + more, max(last, end))


def _frame(axes: Axes, timeline: Timeline, shown: Interval) -> None:
    """Axes in ms from the start of the pass; what is not of the pass is dimmed."""
    axes.set_xlim(*shown)
    rows = ("compute", *timeline.copy_kinds)
    floor = min(ROWS[row][0] for row in rows) - 0.12
    axes.set_ylim(floor, TOP)
    labels = ["compute", *(COPY_NAMES[kind] for kind in timeline.copy_kinds)]
    middles = [ROWS[row][0] + ROWS[row][1] / 2 for row in rows]
    axes.set_yticks(middles, labels, fontsize=10, color=INK)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", labelsize=8.5, colors=MUTED, color=RULE)
    axes.set_xlabel("ms from the start of the pass", fontsize=8.5, color=MUTED, loc="left", labelpad=2)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    for start, end in ((shown[0], 0.0), (timeline.span_ms, shown[1])):
        axes.axvspan(
            start, end, ymax=(STRIP[0] - floor) / (TOP - floor), color="white", alpha=0.62, linewidth=0, zorder=3
        )
    for edge in (0.0, timeline.span_ms):
        axes.vlines(edge, floor, sum(STRIP), color=INK, linewidth=0.8, zorder=4)


def _name_phase(axes: Axes, phase: Phase, timeline: Timeline, shown: Interval) -> None:
    """A strip over the rows: this pass in full, a neighbour by its layer alone if that fits."""
    zero, own = timeline.phase.start_ms, phase == timeline.phase
    start, end = max(phase.start_ms, shown[0]), min(phase.end_ms, shown[1])
    if end <= start:
        return
    axes.broken_barh(
        [(start - zero, end - start)], STRIP, facecolors="#DDE1E6" if own else EMPTY, edgecolors="white", zorder=2
    )
    text = f"{phase.direction}, {phase.layer}" if own else phase.layer.partition(" (")[0]
    if (end - start) / (shown[1] - shown[0]) > 0.007 * len(text):
        middle = (start + end) / 2 - zero
        y = STRIP[0] + STRIP[1] / 2
        axes.text(middle, y, text, ha="center", va="center_baseline", fontsize=8, color=INK if own else MUTED)


def _mark_gaps(axes: Axes, gaps: Sequence[Gap], span_ms: float) -> None:
    """A mark over each gap of the compute row, and the length at the longest that do not crowd one another."""
    longest = sorted(gaps, key=lambda gap: -gap.length_ms)
    middles = [gap.start_ms + gap.length_ms / 2 for gap in longest]
    colour, y = COLOURS["copy without computation"], sum(ROWS["compute"]) + 0.1
    axes.plot(middles[:GAPS_MARKED], [y] * len(middles[:GAPS_MARKED]), "v", color=colour, markersize=4.5, zorder=5)
    named: list[float] = []
    for gap, middle in zip(longest[:GAPS_NAMED], middles, strict=False):
        side = _free_side(middle, middles[:GAPS_MARKED], span_ms)
        if side and all(abs(middle - other) > 0.06 * span_ms for other in named):
            named.append(middle)
            place: dict[str, Any] = {"xytext": (5 * side, 0), "textcoords": "offset points", "va": "center"}
            place["ha"] = "left" if side > 0 else "right"
            axes.annotate(f"{gap.length_ms:.2g} ms", (middle, y), fontsize=8, color=colour, zorder=5, **place)


def _free_side(middle: float, marks: Sequence[float], span_ms: float) -> int:
    """Where a few letters beside a mark touch no other mark and stay inside: right 1, left -1, nowhere 0."""
    for side in (1, -1):
        others = (side * (mark - middle) / span_ms for mark in marks)
        if 0.05 < middle / span_ms + 0.05 * side < 0.95 and not any(0 < away < 0.055 for away in others):
            return side
    return 0


# Numbers -------------------------------------------------------------------------------------------------------------


def _write_numbers(axes: Axes, timeline: Timeline) -> None:
    """Above the panel what matters, at the end of each row its own numbers."""
    copies = {kind: timeline.copies(kind) for kind in timeline.copy_kinds}
    exposed_ms = sum(c.exposed_ms for c in copies.values())
    busy = f"compute busy {timeline.busy_ms / timeline.span_ms:.1%}"
    subtitle = f"{busy}; copies not covered: {exposed_ms:.2f} ms ({_by_direction(copies)})"
    above: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
    axes.text(0, 1.13, f"{timeline.name}: {timeline.span_ms:,.1f} ms", fontsize=11, fontweight="bold", **above)
    axes.text(0, 1.02, subtitle, fontsize=9.5, color=MUTED, **above)
    lines = {"compute": f"{busy.removeprefix('compute ')}\n{_gaps_text(len(timeline.gaps()))}"}
    lines |= {kind: _copies_text(c) for kind, c in copies.items()}
    for row, text in lines.items():
        bottom, height = ROWS[row]
        bad = row in copies and copies[row].exposed_ms > NOTABLE * timeline.span_ms
        colour = COLOURS["copy without computation"] if bad else MUTED
        place = axes.get_yaxis_transform()
        axes.text(1.012, bottom + height / 2, text, transform=place, fontsize=8.5, color=colour, va="center")


def _by_direction(copies: Mapping[str, Copies]) -> str:
    return ", ".join(f"{c.exposed_ms:.2f} of {c.busy_ms:.1f} ms {COPY_NAMES[kind]}" for kind, c in copies.items())


def _copies_text(copies: Copies) -> str:
    if not copies.count:
        return "no copies"
    size = f"{copies.gigabytes:.2f} GB, {copies.gb_per_s:.1f} GB/s" if copies.gigabytes else f"{copies.busy_ms:.1f} ms"
    size += f", {copies.waiting_ms:.1f} waiting" if copies.waiting_ms else ""
    return f"{size}\n{copies.covered:.1%} covered"


def _gaps_text(n: int) -> str:
    return f"{n:,} gap{'' if n == 1 else 's'} over {GAP_MS:g} ms" if n else f"no gap over {GAP_MS:g} ms"


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
