"""Of what code, where and when a run or a measurement was made: versions, hardware, the commit, the date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch


def version_of(package: str) -> str:
    """Nothing where it is not installed; this package may run from its checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions_of(packages: tuple[str, ...]) -> str:
    """Those that are installed, as people read them: "torch 2.11.0, peft 0.21.2"."""
    return ", ".join(f"{name} {version_of(name)}" for name in packages if version_of(name))


def commit() -> str:
    """Of the checkout this package runs from; an installed package has none of its own.

    HF_FPDT_COMMIT says it on machines that have the files and not the history.
    """
    root = Path(__file__).resolve().parents[2]
    told = os.environ.get("HF_FPDT_COMMIT", "")
    if told or not (root / ".git").exists():
        return told or "unknown"
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def conditions_of(packages: tuple[str, ...]) -> dict[str, Any]:
    """What every row of measurements says of the machine and the code, but for the GPU."""
    return {
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30),
        "versions": f"{versions_of(packages)}, python {platform.python_version()}",
        "commit": commit(),
        "date": str(date.today()),
    }


def version_facts(packages: tuple[str, ...]) -> dict[str, str]:
    """Python's version and each package's, as installed."""
    found = {name: version_of(name) or "not installed (source checkout)" for name in packages}
    return {"python": platform.python_version(), **found}


def hardware_facts(*, on_gpu: bool) -> dict[str, str | int | float]:
    """The processor or GPU, its memory, and the number of threads torch used."""
    facts: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["gpu_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
