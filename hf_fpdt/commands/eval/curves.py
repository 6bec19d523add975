"""Curves of the loss by position: the bins they are averaged over, as a table and as a csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..options import tokens_text


@dataclass(frozen=True)
class Curve:
    """Losses of one model state: [windows, positions], float32, on the CPU. Column 0 is position 1."""

    label: str
    losses: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean over all predicted tokens."""
        return self.losses.double().mean().item()

    def between(self, first: int, stop: int) -> float:
        """Mean over the positions first .. stop - 1."""
        return self.losses[:, max(0, first - 1) : stop - 1].double().mean().item()


def position_bins(length_tokens: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions, even in log2: octaves up to 256, where tokens are few, then half-octaves."""
    octaves = [1, 32, 64, 128]
    half_octaves = [round(256 * 2 ** (step / 2)) for step in range(2 * max(0, length_tokens.bit_length() - 8))]
    edges = [edge for edge in (*octaves, *half_octaves) if edge < length_tokens] + [length_tokens]
    return list(zip(edges[:-1], edges[1:], strict=True))


def octave_ranges(length_tokens: int, first_stop: int) -> list[tuple[int, int]]:
    """The rows of the table: up to the pre-training length, then one a doubling."""
    edges = [0, min(first_stop, length_tokens)]
    while edges[-1] < length_tokens:
        edges.append(min(length_tokens, 2 * edges[-1]))
    return list(zip(edges[:-1], edges[1:], strict=True))


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """One row a bin: positions, tokens averaged, one loss a curve."""
    windows, positions = curves[0].losses.shape
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["first_position", "last_position", "tokens", *(curve.label for curve in curves)])
        for first, stop in position_bins(positions + 1):
            losses = [f"{curve.between(first, stop):.5f}" for curve in curves]
            rows.writerow([first, stop - 1, windows * (stop - first), *losses])


def table_lines(curves: Sequence[Curve], pretrained_tokens: int) -> list[str]:
    """The table of a terminal and of the model card, in Markdown."""
    head = ["positions", *(curve.label for curve in curves)]
    rows = []
    for first, stop in octave_ranges(curves[0].losses.shape[1] + 1, pretrained_tokens):
        span = f"{tokens_text(first) if first else '0'}–{tokens_text(stop)}"
        rows.append([span, *(f"{curve.between(first, stop):.3f}" for curve in curves)])
    rows.append(["all", *(f"{curve.mean_loss:.3f}" for curve in curves)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    cells = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
