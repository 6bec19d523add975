"""What lies in docs/results/: rows of bench-*.csv, and step-*.json as long_step.py writes them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
# What files from before there was such a column mean.
FORMER = {"gpus": "1"}
Row = Mapping[str, str]


def read(name: str) -> list[Row]:
    """Rows of a CSV."""
    with (RESULTS / f"bench-{name}.csv").open(encoding="utf-8", newline="") as file:
        return [FORMER | row for row in csv.DictReader(file)]


def read_json(name: str) -> dict[str, Any]:
    """A step of long_step.py, whole."""
    step: dict[str, Any] = json.loads((RESULTS / f"step-{name}.json").read_text(encoding="utf-8"))
    return step


def read_step(name: str) -> Row:
    """A step of long_step.py as a row."""
    step = read_json(name)
    last = step["measured"]["steps"][-1]
    figures = {"tokens_per_s": last["tokens_per_second"], "strict_mfu": last["strict_mfu"], "tokens": step["tokens"]}
    return {"gpus": step["gpus"].split()[0], **{column: str(value) for column, value in figures.items()}}
