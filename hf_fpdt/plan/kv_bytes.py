"""Bytes of one layer's K and V and of their gradients, by chunk: on the device, on the host, in a window's reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..units import page_rounded

Both = tuple[int, int]


class ResidentBytes(NamedTuple):
    """Resident K and V in a forward and in a backward pass, and there their gradients."""

    forward: int
    backward: int
    grads: int


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one layer's K and V and of their fp32 gradients, by chunk, and how many chunks the device holds.

    A layer with a window holds on the device what one row reads, its ring, and nothing on the host.

    Attributes:
        parts: K of each chunk.
        grads: dK of each chunk.
        forward_resident: chunks on the device in a forward pass, from the first; of layers without a window.
        backward_resident: chunks on the device, with their gradients, in a backward pass; likewise.
        value_parts: V of each chunk; (): as K.
        value_grads: dV of each chunk; (): as dK.
        windowed: of each layer of the pass whether it has no K and V of the whole sequence, since it has a window that
            the sequence reaches, or no attention; (): every layer has them.
        forward_ring, backward_ring: the most that such a layer holds.
    """

    parts: tuple[int, ...]
    grads: tuple[int, ...]
    forward_resident: int
    backward_resident: int
    value_parts: tuple[int, ...] = ()
    value_grads: tuple[int, ...] = ()
    windowed: tuple[bool, ...] = ()
    forward_ring: int = 0
    backward_ring: int = 0

    @property
    def both_parts(self) -> tuple[Both, ...]:
        """(K, V) of each chunk."""
        return tuple(zip(self.parts, self.value_parts or self.parts, strict=True))

    @property
    def both_grads(self) -> tuple[Both, ...]:
        """(dK, dV) of each chunk."""
        return tuple(zip(self.grads, self.value_grads or self.grads, strict=True))

    @property
    def all_windowed(self) -> bool:
        """Whether no layer has K and V of the sequence."""
        return bool(self.windowed) and all(self.windowed)

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer of the pass is; the lowest one is 0."""
        return bool(self.windowed) and self.windowed[layer]

    @property
    def resident_parts(self) -> ResidentBytes:
        """What a layer without a window has on the device, but for what is under way."""
        if self.all_windowed:
            return ResidentBytes(0, 0, 0)
        return ResidentBytes(
            _total(self.both_parts[: self.forward_resident]),
            _total(self.both_parts[: self.backward_resident]),
            _total(self.both_grads[: self.backward_resident]),
        )

    @property
    def device_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the device, but for what is under way."""
        resident = self.resident_parts
        rings = max(self.forward_ring, self.backward_ring)
        return max(resident.forward, resident.backward + resident.grads, rings)

    @property
    def host_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the host."""
        if self.all_windowed:
            return 0
        last = len(self.parts) - 1
        forward = _total(self.both_parts[self.forward_resident : last])
        # The last streamed gradients never leave the device, see `StreamedKV`.
        backward = _total(self.both_parts[self.backward_resident : last])
        return max(forward, backward + _total(self.both_grads[self.backward_resident : last - 1]))

    @property
    def host_buffer_bytes(self) -> int:
        """Their buffers, in whole pages: those of a backward pass, which serve the forward pass too."""
        if self.all_windowed:
            return 0
        last = len(self.parts) - 1
        streamed = self.both_parts[self.backward_resident : last]
        streamed += self.both_grads[self.backward_resident : max(0, last - 1)]
        return sum(page_rounded(first) + page_rounded(second) for first, second in streamed)


def holds(kv: KVBytes, budget: int) -> KVBytes:
    """The same with as many of the first chunks resident as the budget holds."""
    both = [part + grad for part, grad in zip(kv.both_parts, kv.both_grads, strict=True)]
    return replace(kv, forward_resident=_count(kv.both_parts, budget), backward_resident=_count(both, budget))


def _count(parts: Sequence[tuple[int, ...]], budget: int) -> int:
    """How many of the first parts fit in the budget."""
    count, total = 0, 0
    while count < len(parts) and total + sum(parts[count]) <= budget:
        total += sum(parts[count])
        count += 1
    return count


def _total(parts: Sequence[Both]) -> int:
    return sum(map(sum, parts))
