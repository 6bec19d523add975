"""Pictures of docs/results/bench-*.csv: stacks side by side, and what more GPUs bring. `publish.py` calls them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from bench_results import Row, read, read_step

matplotlib.use("agg")
from matplotlib import pyplot as plt

PICTURES = ("lora-8b-h100", "full-1b-h100")
REACH = ("fpdt", "liger", "hf", "hf-offload", "alst")  # the stacks whose end was looked for, and ours
# Column of the CSV: title, what a label counts in, its digits.
PANELS = (
    ("tokens_per_s", "thousand tokens a second", 1000, 1),
    ("peak_device_gib", "GPU memory, GiB", 1, 0),
)
STRONG = "strong scaling: thousand tokens a second (dotted: as many times one GPU's)"
WEAK = "weak scaling: strict MFU at the same tokens a GPU"


def draw(name: str, path: Path) -> None:
    """Tokens a second and GPU memory, a group of bars a length, a bar a stack; a cross where it does not fit."""
    rows = read(name)
    lengths = sorted({int(row["tokens"]) for row in rows})
    figure, panels = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for panel, (column, title, unit, digits) in zip(panels, PANELS, strict=True):
        _bars(panel, rows, lengths, (column, unit, digits))
        panel.set_xticks(range(len(lengths)), [f"{n // 1024}K tokens" for n in lengths])
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    _save(figure, f"{_conditions(rows)}; × out of memory", path)


def draw_reach(names: Sequence[str], steps: Sequence[str], path: Path) -> None:
    """Strict MFU by length, a line a stack, up to the longest of it that ran; a number beside each line's end.

    Args:
        names: of CSVs of one model on one kind of GPU.
        steps: of long_step.py, of the same.
        path: of the picture.
    """
    found = [row for name in names for row in read(name)]
    rows = [row for row in found if row["result"] == "ok"] + [read_step(step) for step in steps]
    figure, panel = plt.subplots(figsize=(10, 4.4), layout="constrained")
    for i, stack in enumerate(REACH):
        mine = sorted((int(row["tokens"]), float(row["strict_mfu"])) for row in rows if row["stack"] == stack)
        ours = "fpdt" in stack
        panel.plot(*zip(*mine, strict=True), "o-", color=f"C{i}", lw=3 if ours else 1.5, alpha=1 if ours else 0.7)
        (tokens, mfu), above = mine[-1], 12 if stack in ("fpdt", "hf") else -4
        panel.annotate(f"{stack} {tokens:,}", (tokens, mfu), (8, above), textcoords="offset points", color=f"C{i}")
    panel.set_xscale("log", base=2)
    lengths = sorted({int(row["tokens"]) for row in read(names[0])}) + [2**18, 2**19, 3 * 2**18]
    panel.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    panel.minorticks_off()
    panel.set_xlim(right=2**20 * 1.3)
    panel.set_ylim(0, 0.6)
    panel.set_xlabel("tokens of one sequence")
    panel.set_ylabel("strict MFU")
    panel.spines[["top", "right"]].set_visible(False)
    _save(figure, _conditions(found), path)


def _bars(panel: Any, rows: list[Row], lengths: list[int], what: tuple[str, int, int]) -> None:
    column, unit, digits = what
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    width = 0.8 / len(stacks)
    for i, stack in enumerate(stacks):
        mine = {int(row["tokens"]): row for row in rows if row["stack"] == stack}
        places = [lengths.index(n) + (i - (len(stacks) - 1) / 2) * width for n in mine]
        sizes = [float(row[column] or 0) for row in mine.values()]
        bars = panel.bar(
            places,
            [size / unit for size in sizes],
            width,
            label=stack,
            color=f"C{i}",
            alpha=1 if "fpdt" in stack else 0.6,
        )
        panel.bar_label(bars, [f"{size / unit:.{digits}f}" if size else "×" for size in sizes], fontsize=7)


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _conditions(rows: list[Row]) -> str:
    facts = rows[0]
    return f"{facts['model']}, {facts['layers']} layers, {facts['trained']}, {facts['gpu']}"


def draw_scaling(name: str, steps: Sequence[str], path: Path) -> None:
    """Left: a length on more and more GPUs, beside a straight line. Right: strict MFU, by tokens a GPU.

    Args:
        name: of the CSV.
        steps: of long_step.py, of the same model and on the same machine.
        path: of the picture.
    """
    rows = [row for row in read(name) if row["stack"] == "fpdt"]
    conditions = _conditions(rows)
    rows += [read_step(step) for step in steps]
    figure, (strong, weak) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    for i, length in enumerate(sorted({int(row["tokens"]) for row in rows if row["gpus"] == "1"})):
        _strong(strong, [row for row in rows if int(row["tokens"]) == length], f"C{i}")
    for i, share in enumerate(sorted({_share(row) for row in rows if row["gpus"] == "1"})):
        _weak(weak, [row for row in rows if _share(row) == share], f"C{i}")
    for panel, title in ((strong, STRONG), (weak, WEAK)):
        panel.set_xticks(sorted({int(row["gpus"]) for row in rows}))
        panel.set_xlabel("GPUs")
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    weak.set_ylim(0, 0.6)
    _save(figure, conditions, path)


def _share(row: Row) -> int:
    return int(row["tokens"]) // int(row["gpus"])


def _strong(panel: Any, rows: list[Row], color: str) -> None:
    gpus, speeds = [int(row["gpus"]) for row in rows], [float(row["tokens_per_s"]) / 1000 for row in rows]
    panel.plot(gpus, speeds, "o-", color=color, label=f"{int(rows[0]['tokens']) // 1024}K tokens")
    panel.plot(gpus, [speeds[0] * n / gpus[0] for n in gpus], ":", color=color)
    for n, speed in zip(gpus[1:], speeds[1:], strict=True):
        times = speed / speeds[0]
        panel.annotate(f"{times:.2f}×", (n, speed), (4, -12), textcoords="offset points", fontsize=8)


def _weak(panel: Any, rows: list[Row], color: str) -> None:
    gpus, mfu = [int(row["gpus"]) for row in rows], [float(row["strict_mfu"]) for row in rows]
    panel.plot(gpus, mfu, "o-", color=color, label=f"{_share(rows[0]) // 1024}K tokens a GPU")
    below = -14 if color == "C0" else 6
    for n, value in zip(gpus, mfu, strict=True):
        panel.annotate(f"{value:.3f}", (n, value), (-8, below), textcoords="offset points", fontsize=8)
