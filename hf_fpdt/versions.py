"""Of what code and when a measurement was made: versions of packages, the commit of this one, the date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil


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
    root = Path(__file__).resolve().parent.parent
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
