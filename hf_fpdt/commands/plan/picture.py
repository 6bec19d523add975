"""The picture of a plan: memory of a GPU and of the hosts over one step, and how far host memory reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ...forecast import MemoryCurve, Reach, Use
from ..pictures import check_matplotlib
from ..trace.picture import DPI, INK, MUTED, RULE
from .tables import USE_NAMES

# Of Okabe and Ito's colours; one thing has one colour in both panels of memory.
COLOURS = MappingProxyType(
    {
        Use.WEIGHTS: "#A9AFB7",
        Use.GRADIENTS: "#7C848D",
        Use.OPTIMIZER: "#5A5F66",
        Use.SUMS: "#C9CDD2",
        Use.NCCL: "#3B4046",
        Use.WORKING: "#E8C547",
        Use.KV: "#56B4E9",
        Use.CHECKPOINTS: "#0072B2",
    }
)
LIMIT, POINT = "#D55E00", "#009E73"
SHOWN = 0.003  # of the memory that is available: what is less would be a line too thin to see
UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
SIZE_IN = (12.0, 6.6)


def draw_plan(
    path: str | Path, title: str, curve: MemoryCurve, limits: Mapping[str, float], reach: Sequence[Reach], mark: Reach
) -> None:
    """Write the picture.

    Args:
        path: file to write; its ending says the format (.png, .svg, .pdf).
        title: what is trained on what, in a line.
        curve: memory over a step.
        limits: GiB of a "device" and of all "host"s.
        reach: longest lengths by host memory.
        mark: the planned length, at the host memory that is available.

    Raises:
        PictureError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_IN, dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(2, 2, left=0.06, right=0.985, top=0.86, bottom=0.085, width_ratios=(1.5, 1), hspace=0.3)
    device = figure.add_subplot(grid[0, 0])
    host = figure.add_subplot(grid[1, 0], sharex=device)
    _memory(device, curve, curve.device, Lines("each GPU", limits["device"], "set aside", curve.planned_gib))
    _memory(host, curve, curve.host, Lines("hosts, pinned and in use", limits["host"], "pinned", curve.pinned_gib))
    host.set_xlabel(f"{_unit(curve.seconds[-1])[1]} from the start of a step", color=MUTED)
    _reach(figure.add_subplot(grid[:, 1]), reach, mark)
    figure.text(0.012, 0.965, title, fontsize=13, fontweight="bold", color=INK, va="center")
    keys = {
        label: key for panel in (device, host) for key, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(keys.values(), keys.keys(), loc="center left", bbox_to_anchor=(0.006, 0.92), **_LEGEND)
    figure.savefig(path)


_LEGEND: Mapping[str, Any] = MappingProxyType(
    {"ncols": 7, "frameon": False, "fontsize": 8.2, "handlelength": 1.0, "columnspacing": 1.3, "handletextpad": 0.6}
)


def _unit(seconds: float) -> tuple[float, str]:
    """A unit in which a step of so many seconds reads well, and its name."""
    return next((unit for unit in UNITS if 3 * unit[0] < seconds), (1.0, "seconds"))


class Lines(NamedTuple):
    """Of one panel: what it is of, the GiB that are available, and what the plan takes of them under which name."""

    name: str
    limit: float
    taken: str
    taken_gib: float


def _memory(axes: Axes, curve: MemoryCurve, items: Mapping[Use, Sequence[float]], lines: Lines) -> None:
    """Items stacked over the step, and the memory that is available."""
    most, unit = lines.limit, _unit(curve.seconds[-1])[0]
    shown = {use: values for use, values in items.items() if max(values) >= SHOWN * most}
    times = [seconds / unit for seconds in curve.seconds]
    if shown:
        names, colours = [USE_NAMES[use] for use in shown], [COLOURS[use] for use in shown]
        axes.stackplot(times, *shown.values(), labels=names, colors=colours, linewidth=0)
    axes.axhline(most, color=LIMIT, linewidth=1.2)
    axes.axvline(curve.backward_from / unit, color=INK, linewidth=0.8)
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0, 1.18 * max(most, 1e-3))
    axes.axhline(lines.taken_gib, color=INK, linewidth=1, linestyle=":")
    _note(axes, f"available: {most:,.1f} GiB", most, LIMIT, above=True)
    # Under its line where that is close to the other one.
    _note(axes, f"{lines.taken}: {lines.taken_gib:,.1f} GiB", lines.taken_gib, INK, above=lines.taken_gib < most / 2)
    _over(axes, "forward", 0.0)
    _over(axes, "backward", curve.backward_from / unit)
    _frame(axes, f"{lines.name}, GiB")


def _over(axes: Axes, text: str, x: float) -> None:
    """Over the panel, from x on."""
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (4, 4), "textcoords": "offset points"}
    axes.annotate(text, (x, 1.0), fontsize=8.5, color=MUTED, **place)


def _note(axes: Axes, text: str, y: float, colour: str, *, above: bool) -> None:
    """At the right end of a horizontal line."""
    up = 3 if above else -3
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-4, up), "textcoords": "offset points"}
    axes.annotate(text, (1.0, y), ha="right", va="bottom" if above else "top", fontsize=8.5, color=colour, **place)


def _frame(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(labelsize=8.5, colors=MUTED, color=RULE)


def _reach(axes: Axes, reach: Sequence[Reach], mark: Reach) -> None:
    """Longest lengths, and the plan as a point."""
    hosts, lengths = [r.host_gib for r in reach], [r.tokens / 1024 for r in reach]
    axes.fill_between(hosts, lengths, color="#EEF1F4", linewidth=0)
    axes.plot(hosts, lengths, color=INK, linewidth=1.6)
    axes.plot([mark.host_gib], [mark.tokens / 1024], "o", color=POINT, markersize=7, clip_on=False, zorder=5)
    axes.set_xlim(0, max(hosts))
    axes.set_ylim(0, 1.12 * max(1, *lengths))
    text = f"this plan: {mark.tokens:,} tokens,\n{mark.host_gib:,.0f} GiB"
    low = mark.tokens / 1024 < 0.12 * axes.get_ylim()[1]  # the text must not lie on the axis
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (9, 4 if low else -8)}
    place["va"] = "bottom" if low else "top"
    axes.annotate(text, (mark.host_gib, mark.tokens / 1024), fontsize=9, color=POINT, **place)
    _over(axes, "longest sequence that fits", 0.0)
    axes.set_xlabel("memory of all hosts, GiB", color=MUTED)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}K")
    _frame(axes, "tokens")


if TYPE_CHECKING:
    from matplotlib.axes import Axes
