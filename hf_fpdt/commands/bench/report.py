"""Rows as people and programs read them: a table, CSV, JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Columns of the table: what is in a row, the heading, how it is written.
TABLE = (
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("step_s", "step s", ",.2f"),
    ("strict_mfu", "strict MFU", ".3f"),
    ("mfu_with_recompute", "MFU with recompute", ".3f"),
    ("of_ceiling", "of ceiling", ".0%"),
    ("of_ceiling_once", "nothing twice", ".0%"),
    ("peak_device_gib", "GPU GiB", ".1f"),
    ("pinned_host_gib", "pinned GiB", ".1f"),
    ("peak_rss_gib", "process GiB", ".1f"),
    ("parity", "error / plain HF's", ".2f"),
)
# The table has it where there are several.
GPUS = ("gpus", "GPUs", "d")
# Of a CSV file, in this order; results first, conditions last.
COLUMNS = (
    ("stack", "tokens", "result", "next")
    + tuple(key for key, _, _ in TABLE)
    + ("predicted_s", "predicted_device_gib", "predicted_pinned_gib")
    + (
        "steps_s",
        "pinning_s",
        "loss",
        "ceiling_s",
        "ceiling_once_s",
        "kernel",
        "attention_forward",
        "attention_backward",
        "matmul",
    )
    + ("peak", "model", "layers", "trained", "dtype", "chunk_tokens", "held_gib", "documents", "gpu", "gpus")
    + ("host_memory_gib", "versions", "commit", "date")
)
CONDITIONS = (
    "model",
    "layers",
    "trained",
    "dtype",
    "held_gib",
    "documents",
    "gpu",
    "host_memory_gib",
    "versions",
    "commit",
    "date",
)
OK = "ok"


def as_table(rows: Sequence[Row]) -> str:
    """Lines of a table of plain text; what has no number says why in words."""
    columns = ((GPUS,) if any(row.get("gpus", 1) > 1 for row in rows) else ()) + TABLE
    cells = [["stack", "tokens", *(title for _, title, _ in columns)], *(_cells(row, columns) for row in rows)]
    lasts = len(columns) + 2
    widths = [max(len(line[i]) for line in cells if len(line) == lasts) for i in range(lasts)]
    widths[:2] = [max(len(line[i]) for line in cells) for i in range(2)]
    notes = [f"{row['stack']} at {row['next']}" for row in rows if row.get("next")]
    return "\n".join([*(_line(line, widths) for line in cells), *notes])


def _cells(row: Row, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    head = [str(row["stack"]), f"{row['tokens']:,}" if row.get("tokens") else "-"]
    if row["result"] != OK:
        return [*head, str(row["result"])]
    return head + ["" if row.get(key) is None else format(row[key], form) for key, _, form in columns]


def _line(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    if len(cells) == len(widths):
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])
    return "  ".join([first, cells[1].rjust(widths[1]), *cells[2:]])


def conditions_line(rows: Iterable[Row]) -> str:
    """Under what conditions the rows were measured, once."""
    known = {key: row[key] for row in rows for key in CONDITIONS if row.get(key) is not None}
    words = {
        "layers": "{} layers",
        "held_gib": "{} GiB of a GPU held",
        "documents": "documents {}",
        "host_memory_gib": "{} GiB of host memory",
        "commit": "commit {}",
    }
    return ", ".join(words.get(key, "{}").format(known[key]) for key in CONDITIONS if key in known)


class Files:
    """Writes each row the moment it is there, so that nothing is lost with a machine.

    Args:
        csv_path: a line a row, added to what is there.
        json_path: an object a line, added to what is there.

    Raises:
        FileExistsError: the CSV file has other columns.
    """

    def __init__(self, csv_path: Path | None, json_path: Path | None) -> None:
        self._csv, self._json = csv_path, json_path
        header = _csv_line(COLUMNS)
        if csv_path is not None and not csv_path.exists():
            csv_path.write_text(header, encoding="utf-8")
        elif csv_path is not None and not csv_path.read_text(encoding="utf-8").startswith(header):
            raise FileExistsError(f"{csv_path} is there and has other columns; give another --csv, or move it away.")

    def add(self, row: Row) -> None:
        """Write one row."""
        if self._csv is not None:
            _append(self._csv, _csv_line([_cell(row.get(key)) for key in COLUMNS]))
        if self._json is not None:
            _append(self._json, json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _csv_line(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
