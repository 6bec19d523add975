"""How much memory there is: of the GPU, of the host within its control groups, of a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ..config import FPDTPlugin
from ..plan import HOST_RESERVE, NO_LIMIT, Available
from .disk import free_bytes


def available(plugin: FPDTPlugin, device: torch.device, training_bytes: int, step_bytes: int) -> Available:
    """What "auto" starts from, measured when the first layer begins.

    Args:
        training_bytes: what gradients and optimizer will still take of the device.
        step_bytes: what the step has on the device already; it counts among what a step takes, and not twice.
    """
    still = training_bytes - step_bytes
    on_device = device_bytes_available(device) - still if device.type == "cuda" else NO_LIMIT
    disk = 0 if plugin.disk_dir is None else free_bytes(plugin.disk_dir) // local_processes()
    return Available(max(0, on_device), host_bytes_available(), disk)


def host_bytes_available() -> int:
    """Host memory that this process may still take: the system's, or the container's where that is less."""
    own = Path("/proc/self/cgroup")
    limits = _container_bytes_available(Path("/sys/fs/cgroup"), own.read_text() if own.exists() else "")
    available = min([int(psutil.virtual_memory().available), *limits])
    return max(0, available - HOST_RESERVE) // local_processes()


def local_processes() -> int:
    """Processes that share this machine's memory and disks; launchers say how many there are."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_bytes_available(root: Path, own: str) -> Iterator[int]:
    """What each control group around this process leaves of its limit, where it has one.

    Args:
        root: where control groups are mounted.
        own: the process's, a line for each hierarchy: number, controllers (none in version 2), path.
    """
    lines = [line.split(":", 2) for line in own.splitlines()] or [["0", "", "/"]]
    for _, controllers, path in lines:
        if not controllers:
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(top):
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, used: str) -> Iterator[int]:
    texts = [(folder / name).read_text().strip() if (folder / name).exists() else "max" for name in (limit, used)]
    if "max" not in texts:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Files that were read and may be dropped again count as used.
        yield int(texts[0]) - int(texts[1]) + int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def device_bytes_available(device: torch.device) -> int:
    """Device memory that this process may still take, unused parts of PyTorch's own cache included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
