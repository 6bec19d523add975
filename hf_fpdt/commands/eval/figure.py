"""The loss-by-position figure: one line a model state, positions on a log2 axis, a mark at the pre-training length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import tokens_text
from ..pictures import check_matplotlib
from .curves import Curve, position_bins

COLOURS = ("#b23a2e", "#7a7f87", "#1f5fa8")
FIRST_POSITION_SHOWN = 16


def draw(path: Path, curves: Sequence[Curve], pretrained_tokens: int, title: str) -> None:
    """Write the figure as a PNG that stays readable at the width of a README (about 800 pixels).

    Raises:
        PictureError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), dpi=200)
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        _draw_curve(axes, curve, number, is_last=number == len(curves) - 1)
    windows, positions = curves[0].losses.shape
    _label_axes(axes, positions + 1, pretrained_tokens)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    subtitle = f"mean over {windows} held-out windows of {tokens_text(positions + 1)} tokens; lower is better"
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555", va="bottom")
    axes.legend(frameon=False, fontsize=9.5, loc="best")
    figure.tight_layout()
    figure.savefig(path)


def _draw_curve(axes: Axes, curve: Curve, number: int, is_last: bool) -> None:
    bins = [b for b in position_bins(curve.losses.shape[1] + 1) if b[1] > FIRST_POSITION_SHOWN]
    centres = [(max(first, FIRST_POSITION_SHOWN) * stop) ** 0.5 for first, stop in bins]
    losses = [curve.between(first, stop) for first, stop in bins]
    thin = not is_last and number > 0  # only the first and the last state are the comparison
    style: dict[str, Any] = (
        {"linewidth": 1.2, "linestyle": (0, (4, 2))} if thin else {"linewidth": 2.2, "marker": "o", "markersize": 3.5}
    )
    axes.plot(centres, losses, color=COLOURS[-1] if is_last else COLOURS[number], label=curve.label, **style)


def _label_axes(axes: Axes, length_tokens: int, pretrained_tokens: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(5, 31) if 2**power <= length_tokens]
    skip = max(1, len(ticks) // 9)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1][::skip][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda position, _: tokens_text(round(position))))
    axes.set_xlabel("position in the document (tokens of context before the predicted one)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if pretrained_tokens < length_tokens:
        axes.axvline(pretrained_tokens, color="#333333", linewidth=1.0, linestyle=":")
        place = axes.get_xaxis_transform()
        text = f"  pre-trained up to {tokens_text(pretrained_tokens)}"
        axes.text(pretrained_tokens, 0.98, text, transform=place, fontsize=8.5, color="#333333", va="top")


if TYPE_CHECKING:
    from matplotlib.axes import Axes
