"""A step rehearsed with numbers in place of tensors, in the executor's own order: what it takes at its peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .checkpointing import KeptLayers, forward_order
from .kv_bytes import KVBytes
from .layer_bytes import LayerBytes
from .tiers import SOON, Budgets, BufferPool, ExistingBuffers, Observer, Slot, TierAllocator


def without_kv(budgets: Budgets, kv: KVBytes, have: ExistingBuffers | None = None) -> Budgets:
    """What is left for checkpoints of budgets that count K and V on the host, and the buffers of K, V that exist."""
    there = sum(size * count for size, count in have.kv.items()) if have else 0
    return Budgets(budgets.device, max(0, budgets.host - max(there, kv.host_buffer_bytes)), budgets.disk)


@dataclass(frozen=True)
class Forecast:
    """What a step takes.

    Attributes:
        kept: the plan.
        device_bytes: most that checkpoints hold on the device.
        host_bytes: all pinned buffers.
        disk_bytes: most that files hold.
        new_buffers: sizes of the pinned buffers of checkpoints that are not there yet, and how many of each.
        new_kv_buffers: the same of K and V.
    """

    kept: KeptLayers
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    new_buffers: Mapping[int, int] = field(default_factory=dict)
    new_kv_buffers: Mapping[int, int] = field(default_factory=dict)


def forecast(
    kept: KeptLayers, sizes: LayerBytes, kv: KVBytes, budgets: Budgets, have: ExistingBuffers | None = None
) -> Forecast | None:
    """Play a step: every layer forward, then every layer backward; None where the budgets do not hold it.

    Args:
        budgets: `device` is what checkpoints may take of it, without K and V; `host` counts both.
        have: the pinned buffers that exist; None: there are none.
    """
    have = have or ExistingBuffers()
    left = without_kv(budgets, kv, have)
    pool, kv_pool = pool_of_numbers(have.checkpoints, left.host), pool_of_numbers(have.kv, budgets.host)
    step = Rehearsal(kept, sizes, kv, TierAllocator(left, pool, kv_pool))
    if not all(step.play()) or pool.nbytes + kv_pool.nbytes > budgets.host:
        return None
    peak, host = step.allocator.peak, pool.nbytes + kv_pool.nbytes
    new, new_kv = pool.made - Counter(have.checkpoints), kv_pool.made - Counter(have.kv)
    return Forecast(kept, peak["device"], host, peak["disk"], dict(new), dict(new_kv))


def pool_of_numbers(have: Mapping[int, int], limit: int) -> BufferPool[int]:
    """A pool of plain numbers."""
    pool: BufferPool[int] = BufferPool(lambda size: size, limit)
    for size, count in have.items():
        for _ in range(count):
            pool.add(size, size)
    return pool


class Rehearsal:
    """The puts and takes of one step, in the order in which the executor makes them; each yields whether it fits.

    Args:
        look: called after each chunk with the phase ("forward", "rebuild", "backward"), the layer and the chunk.
    """

    def __init__(
        self,
        kept: KeptLayers,
        sizes: LayerBytes,
        kv: KVBytes,
        allocator: TierAllocator[int],
        look: Observer | None = None,
    ) -> None:
        self.kept, self.sizes, self.kv, self.allocator = kept, sizes, kv, allocator
        self.look = look or (lambda phase, layer, chunk: None)
        self.order = forward_order(kept, sizes, allocator.budgets)
        self.places: dict[tuple[int, str, int], Slot[int]] = {}
        self.chunks = range(len(sizes.inputs))

    def play(self) -> Iterator[bool]:
        """Every layer forward, then every layer backward."""
        for layer in range(self.kept.layers):
            yield from self._forward(layer)
        for layer in reversed(range(self.kept.layers)):
            if (layer, "input", 0) not in self.places:
                yield from self._rebuild(self.kept.base(layer), layer)
            yield from self._backward(layer)

    def _put(self, layer: int, name: str, chunk: int, *, rebuilt: bool = False) -> Iterator[bool]:
        sizes = {"input": self.sizes.inputs, "out": self.sizes.outs, "lse": self.sizes.lses}.get(name)
        nbytes = self.sizes.states_of(layer)[name] if sizes is None else sizes[chunk]
        place = self.allocator.place(nbytes, SOON if rebuilt else self.order.next(nbytes))
        if place is not None:
            self.places[layer, name, chunk] = place
        yield place is not None

    def _put_linears(self, layer: int, chunk: int, *, late: bool) -> Iterator[bool]:
        """Outputs of linears, each on its own tier: those that the layer calls before attention, or after it."""
        for kept, linear in zip(self.kept.linears_of(layer), self.sizes.linears_of(layer), strict=False):
            tier = kept.tier(chunk, len(self.chunks)) if linear.late == late else None
            if tier is not None:
                place = self.allocator.place(linear.chunks[chunk], (tier,))
                if place is not None:
                    self.places[layer, linear.name, chunk] = place
                yield place is not None

    def _take(self, layer: int, *names: str, chunk: int) -> None:
        for name in names:
            place = self.places.pop((layer, name, chunk), None)
            if place is not None:
                self.allocator.leave(place)

    def _forward(self, layer: int) -> Iterator[bool]:
        kv: list[Slot[int]] = []
        for chunk in self.chunks:
            if self.kept.inputs[layer]:
                yield from self._put(layer, "input", chunk)
            yield from self._put_linears(layer, chunk, late=False)
            yield from self._put_kv(kv, layer, chunk, self.kv.forward_resident)
            if self.kept.attentions[layer] and self.sizes.has_attention(layer):
                yield from self._put(layer, "out", chunk)
                yield from self._put(layer, "lse", chunk)
            yield from self._put_linears(layer, chunk, late=True)
            for name in self.sizes.states_of(layer) if chunk < self.chunks[-1] else ():
                yield from self._put(layer, name, chunk + 1)
            self.look("forward", layer, chunk)
        self._close(kv)

    def _put_kv(self, held: list[Slot[int]], layer: int, chunk: int, resident: int) -> Iterator[bool]:
        # The last chunk's K and V are read by its own row alone, from the device; those in a window never leave it.
        if resident <= chunk < self.chunks[-1] and not self.kv.is_windowed(layer):
            yield from self._hold(held, self.kv.both_parts[chunk])

    def _hold(self, held: list[Slot[int]], both: tuple[int, int]) -> Iterator[bool]:
        for nbytes in both:
            place = self.allocator.place_kv(nbytes)
            if place is not None:
                held.append(place)
            yield place is not None

    def _close(self, held: list[Slot[int]]) -> None:
        for place in held:
            self.allocator.leave(place)

    def _rebuild(self, base: int, layer: int) -> Iterator[bool]:
        for below in range(base, layer):
            kv: list[Slot[int]] = []
            missing = not self.kept.attentions[below]
            for chunk in self.chunks:
                if missing:
                    yield from self._put_kv(kv, below, chunk, self.kv.forward_resident)
                    yield from self._put(below, "out", chunk, rebuilt=True)
                    yield from self._put(below, "lse", chunk, rebuilt=True)
                yield from self._put(below + 1, "input", chunk, rebuilt=True)
                self.look("rebuild", below, chunk)
            self._close(kv)

    def _backward(self, layer: int) -> Iterator[bool]:
        kv: list[Slot[int]] = []
        for chunk in self.chunks[:-1]:
            yield from self._put_kv(kv, layer, chunk, self.kv.backward_resident)
        for chunk in reversed(self.chunks):
            linears = [linear.name for linear in self.sizes.linears_of(layer)]
            self._take(layer, "input", "out", "lse", *self.sizes.states_of(layer), *linears, chunk=chunk)
            if chunk == self.chunks[-1] and not self.kv.is_windowed(layer):
                # Gradients of the row's last keys are the next row's, and never leave the device.
                for earlier in range(self.kv.backward_resident, chunk - 1):
                    yield from self._hold(kv, self.kv.both_grads[earlier])
            self.look("backward", layer, chunk)
        self._close(kv)
