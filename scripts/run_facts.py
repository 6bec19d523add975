"""Where and with what a run was made: versions and hardware, for run.json and the model card."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("hf_fpdt", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


def version_facts() -> dict[str, str]:
    """Python's version and each package's, as installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "not installed (source checkout)"


def hardware_facts(device: str) -> dict[str, str | int | float]:
    """The processor or GPU, its memory, and the number of threads torch used."""
    facts: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device == "cuda":
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
