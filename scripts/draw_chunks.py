"""Draws docs/images/chunks.png: which keys a row of queries reads, in which order, forward and backward."""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_fpdt.layout.chunks import ChunkPlan

CHUNKS, TOKENS = 6, 4096
RESIDENT = 3
INK, DONE, STREAMED, DIAGONAL = "#1a1a1a", "#56b4e9", "#e8c547", "#0072b2"
WHERE = Path(__file__).parent.parent / "docs" / "images" / "chunks.png"


def rows(*, backward: bool) -> list[int]:
    """Chunks of queries in the order in which their rows are done."""
    chunks = [chunk.index for chunk in ChunkPlan(CHUNKS * TOKENS, TOKENS, 1).chunks]
    return chunks[::-1] if backward else chunks


def panel(axes: Axes, title: str, order: list[int], under: str) -> None:
    """One pass: a square for every pair of a chunk of queries and one of keys, numbered by the order of its row."""
    for turn, query in enumerate(order, 1):
        for key in range(query + 1):
            colour = DIAGONAL if key == query else DONE if key < RESIDENT else STREAMED
            axes.add_patch(Rectangle((key, query), 0.94, 0.94, color=colour, lw=0))
        axes.text(-0.25, query + 0.5, f"{turn}.", ha="right", va="center", color=INK, fontsize=10)
    axes.set(xlim=(-0.9, CHUNKS), ylim=(CHUNKS, -0.1), aspect="equal")
    axes.set_xticks([i + 0.47 for i in range(CHUNKS)], [f"K, V {i}" for i in range(CHUNKS)], fontsize=8)
    axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(under, fontsize=9, color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=WHERE, help="where to write it (default: %(default)s)")
    where = parser.parse_args().file
    figure = Figure(figsize=(9.6, 5.2), dpi=130, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(
        left,
        "forward: rows of queries, first to last",
        rows(backward=False),
        "row i reads keys 0..i: out, lse of its chunk are done",
    )
    panel(
        right,
        "backward: last to first",
        rows(backward=True),
        "row i ends dQ, dK and dV of chunk i: no later row reads it",
    )
    keys = {
        "its own keys, the diagonal": DIAGONAL,
        "on the GPU, one call over all": DONE,
        "streamed, one ahead": STREAMED,
    }
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=colour) for colour in keys.values()],
        keys,
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(where)


if __name__ == "__main__":
    main()
