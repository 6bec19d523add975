"""State that a replay must find as the forward pass did: random generators, autocast, modules' modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Of PEFT's layers, and of what it wraps around modules that are saved with adapters.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")


@dataclass(frozen=True)
class RandomState:
    """State of the CPU's generator and of one device's."""

    device: torch.device
    cpu_state: Tensor
    device_state: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state; reads no device memory."""
        on_gpu = device.type == "cuda"
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None)

    def restore(self) -> None:
        """Make the generators continue from here."""
        torch.set_rng_state(self.cpu_state)
        if self.device_state is not None:
            torch.cuda.set_rng_state(self.device_state, self.device)

    def is_now(self) -> bool:
        """Whether nothing was drawn since."""
        now = RandomState.now(self.device)
        pairs = ((self.cpu_state, now.cpu_state), (self.device_state, now.device_state))
        return all(then is None or present is None or torch.equal(then, present) for then, present in pairs)


@contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators continue outside as if nothing had been."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class Autocast:
    """Autocast settings of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """The present settings."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run inside these settings with an empty cast cache, and leave none behind.

        Autocast caches the low-precision copy of a weight. A copy made without grad and found again with grad would
        cut the weight off its gradient, so the cache is emptied wherever FPDT changes between the two.
        """
        torch.clear_autocast_cache()
        try:
            with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled):
                yield
        finally:
            torch.clear_autocast_cache()


def modes_of(layer: nn.Module) -> tuple[object, ...]:
    """What says how a layer's modules compute: whether they train, and which of PEFT's adapters act."""
    found: list[object] = []
    for module in layer.modules():
        found.append(module.training)
        if "_active_adapter" in vars(module) or hasattr(type(module), "_active_adapter"):
            found += [getattr(module, name, None) for name in _ADAPTERS]
    return tuple(tuple(mode) if isinstance(mode, list) else mode for mode in found)
