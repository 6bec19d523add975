"""How much memory there is, of GPU, host within its control groups and disk, and what training will take of it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..config import FPDTPlugin
from ..plan import HOST_RESERVE, NO_LIMIT, Available, state_bytes, sum_bytes
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


def parameter_count(parameters: Iterable[nn.Parameter], *, trained: bool = False) -> int:
    """Numbers in all of them, or in those that train; under FSDP2 of all ranks together."""
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def kind_of(optimizer: Any) -> str:
    """The kind of an optimizer, by its class's name; "adamw", the largest of them, where that says nothing.

    Args:
        optimizer: of torch, transformers or bitsandbytes, or accelerate's around it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    name = type(inner).__name__.lower()
    if "adam" in name and ("8bit" in name or getattr(getattr(inner, "args", None), "optim_bits", 32) == 8):
        return "adamw-8bit"
    if "sgd" in name:
        return "sgd-momentum" if inner.defaults.get("momentum") else "sgd"
    return name if name in ("adafactor", "lion") else "adamw"


@dataclass
class TrainingMemory:
    """What training one model will still take of the device, beside a step's activations.

    Attributes:
        model: with the weights that train.
        layers: its decoder layers.
        optimizer: of those weights, if it is known; else it is taken for AdamW. Weak: a copied model has another.
    """

    model: nn.Module
    layers: list[nn.Module]
    optimizer: weakref.ref[Any] | None = None

    def __call__(self) -> int:
        """Bytes of gradients and optimizer states that are not there yet, and of the sums of gradients over chunks."""
        own = [(p, getattr(p, "_local_tensor", p)) for p in self.model.parameters() if p.requires_grad]
        gradients = sum(local.numel() * local.element_size() for p, local in own if p.grad is None)
        inside = [parameter_count(layer.parameters(), trained=True) for layer in self.layers]
        outside = parameter_count(self.model.parameters(), trained=True) - sum(inside)
        return gradients + self._states(own) + sum_bytes(max(outside, *inside))

    def _states(self, own: list[tuple[Any, Any]]) -> int:
        optimizer = None if self.optimizer is None else self.optimizer()
        kind = "adamw" if optimizer is None else kind_of(optimizer)
        there = {} if optimizer is None else optimizer.state
        return sum(state_bytes(kind, local.numel(), local.element_size()) for p, local in own if p not in there)
