"""State that a replay must find as the forward pass did: random generators, autocast, modules' modes, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Of PEFT's layers, and of what it wraps around modules that are saved with adapters.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
DROPOUTS = frozenset(
    (functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout, torch.dropout_)
)


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


class NoDropout(TorchFunctionMode):
    """Inside, nothing is dropped: whole and in chunks it would be otherwise. That it acts on tokens alone is known."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


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


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """How often each was written; tensors of inference mode do not say."""
    return [0 if weight.is_inference() else weight._version for weight in weights]


class OwnWrites:
    """What a layer's own forward writes to its weights, which is no change from one call to the next.

    PEFT's adapters of parameters (`ParamWrapper`, of experts) put a parameter aside and back in every call: its values
    stay, and autograd counts a write. So such a weight is looked at here; autograd watches the others.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._counts: list[int] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around each call of the layer's own forward."""
        before = versions_of(self._weights)
        try:
            yield
        finally:
            for index, version in enumerate(before):
                self._counts[index] += self._weights[index]._version - version

    def __bool__(self) -> bool:
        """Whether there are such weights."""
        return bool(self._weights)

    def find(self, weights: Sequence[Tensor], before: Sequence[int]) -> None:
        """Add what was written in the forward pass that is over.

        Args:
            before: the weights' versions when it began.
        """
        known = {id(weight) for weight in self._weights}
        for weight, version, now in zip(weights, before, versions_of(weights), strict=True):
            if now != version and id(weight) not in known:
                self._weights.append(weight)
                self._counts.append(0)

    def others(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Those of the weights that the layer itself leaves alone."""
        known = {id(weight) for weight in self._weights}
        return [weight for weight in weights if id(weight) not in known]

    def versions(self) -> tuple[int, ...]:
        """How often anybody else has written to each such weight."""
        return tuple(w._version - count for w, count in zip(self._weights, self._counts, strict=True))
