"""What lies in docs/results/: rows of bench-*.csv, and step-*.json as long_step.py writes them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
GIB = 2**30
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
    """A step of long_step.py as a row of a CSV, with what was predicted of it."""
    step = read_json(name)
    last, forecast = step["measured"]["steps"][-1], step["foretold"]
    # By the step's own plan, else by the planner, which in older files has what it set aside alone.
    planned = forecast.get("peak_device_bytes", sum(forecast["device_bytes"].values())) / GIB
    device = step["measured"].get("predicted_device_gib", planned)
    figures = {
        "tokens": step["tokens"],
        "step_s": last["step_seconds"],
        "tokens_per_s": last["tokens_per_second"],
        "strict_mfu": last["strict_mfu"],
        "peak_device_gib": last["device_peak_gib"],
        "pinned_host_gib": last["host_gib"],
        "predicted_s": forecast["seconds"],
        "predicted_device_gib": device,
        "predicted_pinned_gib": forecast["host_bytes"] / GIB,
    }
    facts = {"stack": "fpdt", "result": "ok", "gpus": step["gpus"].split()[0]}
    return facts | {column: str(value) for column, value in figures.items()}
