"""Which tier an entry of the stores goes to, and a whole step played through in whole numbers; no torch.

Three tiers: device memory, pinned host memory, files. Stores place real buffers by the rules of this file, and the
planner plays the same rules with plain numbers for buffers, so what it foretells is what they allocate, to the byte.

The last layers are needed first, so they go to the device; what the device cannot hold goes to the host, and what
neither holds, the first layers, to files. What backward rebuilds is needed soon: device first. K and V that the device
does not hold have host buffers of their own, which checkpoints neither crowd out nor waste on a small lse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from .keep import Kept, LayerBytes, forward_bytes

PAGE = 4096
LONGER = 1.5
T = TypeVar("T")
Tier = Literal["device", "host", "disk"]
Look = Callable[[Literal["forward", "rebuild", "backward"], int, int], None]
SOON: tuple[Tier, ...] = ("device", "host", "disk")


def page_rounded(nbytes: int) -> int:
    """The next multiple of a page: what pinning and direct I/O want, and less than 0.1 % of any real entry."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True)
class Budgets:
    """Bytes that each tier may hold on this rank."""

    device: int
    host: int
    disk: int = 0

    @property
    def total(self) -> int:
        """All tiers together."""
        return self.device + self.host + self.disk


class BufferPool(Generic[T]):
    """Buffers of exact (page-rounded) sizes that are handed out and taken back, and made where none is free.

    Args:
        make: a new buffer of so many bytes.
        limit: bytes of all buffers together.
    """

    def __init__(self, make: Callable[[int], T], limit: int) -> None:
        self._make, self.limit = make, limit
        self._free: dict[int, list[T]] = {}
        self.made: Counter[int] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free or not."""
        return sum(size * count for size, count in self.made.items())

    @property
    def used_bytes(self) -> int:
        """Bytes of the buffers that are handed out."""
        return self.nbytes - sum(size * len(buffers) for size, buffers in self._free.items())

    def take(self, nbytes: int) -> tuple[int, T] | None:
        """(size, buffer): the smallest free one that holds `nbytes`, else a new one; None where it would be too much.

        A somewhat longer buffer serves too; a much longer one, which something else will need, only where there is no
        room for a new one.
        """
        size = page_rounded(nbytes)
        free = min((free for free, buffers in self._free.items() if buffers and free >= nbytes), default=None)
        is_full = self.nbytes + size > self.limit
        if free is not None and (free <= LONGER * size or is_full):
            return free, self._free[free].pop()
        if is_full:
            return None
        self.made[size] += 1
        return size, self._make(size)

    def give(self, size: int, buffer: T) -> None:
        """Take a buffer back, or in."""
        self._free.setdefault(size, []).append(buffer)

    def clear(self) -> None:
        """Forget all buffers; none may be handed out."""
        self._free.clear()
        self.made.clear()

    def add(self, size: int, buffer: T) -> None:
        """A buffer made elsewhere, free from now on."""
        self.made[size] += 1
        self.give(size, buffer)


@dataclass
class Place(Generic[T]):
    """Where one entry lies: `buffer` on the host alone, its `size` there and the `pool` that it is of."""

    tier: Tier
    nbytes: int
    size: int = 0
    buffer: T | None = None
    pool: BufferPool[T] | None = None


class Shelves(Generic[T]):
    """The three tiers: what is used of each, and the most that was.

    Args:
        pool: host buffers of checkpoints.
        kv_pool: host buffers of K, V and their gradients; None: the same.
    """

    def __init__(self, budgets: Budgets, pool: BufferPool[T], kv_pool: BufferPool[T] | None = None) -> None:
        self.budgets, self.pool = budgets, pool
        self.kv_pool = pool if kv_pool is None else kv_pool
        self.used: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def place(self, nbytes: int, order: tuple[Tier, ...] = SOON) -> Place[T] | None:
        """A place on the first tier of `order` that has room; None where none has."""
        for tier in order:
            place = self._on(tier, nbytes)
            if place is not None:
                return self._counted(place)
        return None

    def place_kv(self, nbytes: int) -> Place[T] | None:
        """A host buffer for K, V or a gradient of them; None where there is no room."""
        place = self._buffer(self.kv_pool, nbytes)
        return None if place is None else self._counted(place)

    def _counted(self, place: Place[T]) -> Place[T]:
        self.used[place.tier] += place.nbytes
        self.peak[place.tier] = max(self.peak[place.tier], self.used[place.tier])
        return place

    @staticmethod
    def _buffer(pool: BufferPool[T], nbytes: int) -> Place[T] | None:
        taken = pool.take(nbytes)
        return None if taken is None else Place("host", nbytes, *taken, pool)

    def _on(self, tier: Tier, nbytes: int) -> Place[T] | None:
        if tier == "host":
            return self._buffer(self.pool, nbytes)
        limit = self.budgets.device if tier == "device" else self.budgets.disk
        return Place(tier, nbytes) if self.used[tier] + nbytes <= limit else None

    def leave(self, place: Place[T]) -> None:
        """The entry is gone."""
        self.used[place.tier] -= place.nbytes
        if place.buffer is not None and place.pool is not None:
            place.pool.give(place.size, place.buffer)


@dataclass
class ForwardOrder:
    """The tiers in the order in which the next entry of a forward pass should try them."""

    expected_bytes: int
    budgets: Budgets
    put_bytes: int = 0

    def next(self, nbytes: int) -> tuple[Tier, ...]:
        """For an entry of `nbytes`; the last bytes of the pass are those that the device holds."""
        left = self.expected_bytes - self.put_bytes
        self.put_bytes += nbytes
        if left <= self.budgets.device:
            return ("device", "host", "disk")
        return ("host", "device", "disk") if left <= self.budgets.device + self.budgets.host else ("disk", "host")


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one layer's K (as many of V) and of its fp32 gradient, by chunk, and how many chunks the device holds.

    Attributes:
        parts: K of each chunk.
        grads: dK of each chunk.
        forward_resident: chunks on the device in a forward pass, from the first.
        backward_resident: chunks on the device, with their gradients, in a backward pass.
    """

    parts: tuple[int, ...]
    grads: tuple[int, ...]
    forward_resident: int
    backward_resident: int

    @property
    def device_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the device, but for what is under way."""
        backward = sum(self.parts[: self.backward_resident]) + sum(self.grads[: self.backward_resident])
        return 2 * max(sum(self.parts[: self.forward_resident]), backward)

    @property
    def host_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the host."""
        last = len(self.parts) - 1
        forward = sum(self.parts[self.forward_resident : last])
        # The last streamed gradients never leave the device, see `StreamedKV`.
        backward = sum(self.parts[self.backward_resident : last]) + sum(self.grads[self.backward_resident : last - 1])
        return 2 * max(forward, backward)

    @property
    def host_buffer_bytes(self) -> int:
        """Their buffers, in whole pages: those of a backward pass, which serve the forward pass too."""
        last = len(self.parts) - 1
        streamed = self.parts[self.backward_resident : last] + self.grads[self.backward_resident : max(0, last - 1)]
        return 2 * sum(map(page_rounded, streamed))


@dataclass(frozen=True)
class Have:
    """Sizes of the pinned buffers that exist, and how many of each: of checkpoints, and of K and V."""

    checkpoints: Mapping[int, int] = field(default_factory=dict)
    kv: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.kv)


def without_kv(budgets: Budgets, kv: KVBytes, have: Have) -> Budgets:
    """What is left for checkpoints of budgets that count K and V on the host, and the buffers of K, V that exist."""
    there = sum(size * count for size, count in have.kv.items())
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

    kept: Kept
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    new_buffers: Mapping[int, int] = field(default_factory=dict)
    new_kv_buffers: Mapping[int, int] = field(default_factory=dict)


def forecast(
    kept: Kept, sizes: LayerBytes, kv: KVBytes, budgets: Budgets, have: Mapping[int, int] | Have
) -> Forecast | None:
    """Play a step: every layer forward, then every layer backward; None where the budgets do not hold it.

    Args:
        budgets: `device` is what checkpoints may take of it, without K and V; `host` counts both.
        have: the pinned buffers that exist; a plain mapping: of checkpoints alone.
    """
    have = have if isinstance(have, Have) else Have(have)
    left = without_kv(budgets, kv, have)
    pool, kv_pool = pool_of_numbers(have.checkpoints, left.host), pool_of_numbers(have.kv, budgets.host)
    step = PlayedStep(kept, sizes, kv, Shelves(left, pool, kv_pool))
    if not all(step.play()) or pool.nbytes + kv_pool.nbytes > budgets.host:
        return None
    peak, host = step.shelves.peak, pool.nbytes + kv_pool.nbytes
    new, new_kv = pool.made - Counter(have.checkpoints), kv_pool.made - Counter(have.kv)
    return Forecast(kept, peak["device"], host, peak["disk"], dict(new), dict(new_kv))


def pool_of_numbers(have: Mapping[int, int], limit: int) -> BufferPool[int]:
    """A pool of plain numbers."""
    pool: BufferPool[int] = BufferPool(lambda size: size, limit)
    for size, count in have.items():
        for _ in range(count):
            pool.add(size, size)
    return pool


class PlayedStep:
    """The puts and takes of one step, in the order in which the executor makes them; each yields whether it fits.

    Args:
        look: called after each chunk with the phase ("forward", "rebuild", "backward"), the layer and the chunk.
    """

    def __init__(
        self, kept: Kept, sizes: LayerBytes, kv: KVBytes, shelves: Shelves[int], look: Look | None = None
    ) -> None:
        self.kept, self.sizes, self.kv, self.shelves = kept, sizes, kv, shelves
        self.look = look or (lambda phase, layer, chunk: None)
        self.order = ForwardOrder(forward_bytes(kept, sizes), shelves.budgets)
        self.places: dict[tuple[int, str, int], Place[int]] = {}
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
        sizes = {"input": self.sizes.inputs, "out": self.sizes.outs, "lse": self.sizes.lses}[name]
        place = self.shelves.place(sizes[chunk], SOON if rebuilt else self.order.next(sizes[chunk]))
        if place is not None:
            self.places[layer, name, chunk] = place
        yield place is not None

    def _take(self, layer: int, *names: str, chunk: int) -> None:
        for name in names:
            place = self.places.pop((layer, name, chunk), None)
            if place is not None:
                self.shelves.leave(place)

    def _forward(self, layer: int) -> Iterator[bool]:
        kv: list[Place[int]] = []
        for chunk in self.chunks:
            if self.kept.inputs[layer]:
                yield from self._put(layer, "input", chunk)
            yield from self._put_kv(kv, chunk, self.kv.forward_resident)
            if self.kept.attentions[layer]:
                yield from self._put(layer, "out", chunk)
                yield from self._put(layer, "lse", chunk)
            self.look("forward", layer, chunk)
        self._close(kv)

    def _put_kv(self, held: list[Place[int]], chunk: int, resident: int) -> Iterator[bool]:
        # The last chunk's K and V are read by its own row alone, from the device.
        if resident <= chunk < self.chunks[-1]:
            yield from self._hold(held, self.kv.parts[chunk])

    def _hold(self, held: list[Place[int]], nbytes: int) -> Iterator[bool]:
        for _ in range(2):
            place = self.shelves.place_kv(nbytes)
            if place is not None:
                held.append(place)
            yield place is not None

    def _close(self, held: list[Place[int]]) -> None:
        for place in held:
            self.shelves.leave(place)

    def _rebuild(self, base: int, layer: int) -> Iterator[bool]:
        for below in range(base, layer):
            kv: list[Place[int]] = []
            missing = not self.kept.attentions[below]
            for chunk in self.chunks:
                if missing:
                    yield from self._put_kv(kv, chunk, self.kv.forward_resident)
                    yield from self._put(below, "out", chunk, rebuilt=True)
                    yield from self._put(below, "lse", chunk, rebuilt=True)
                yield from self._put(below + 1, "input", chunk, rebuilt=True)
                self.look("rebuild", below, chunk)
            self._close(kv)

    def _backward(self, layer: int) -> Iterator[bool]:
        kv: list[Place[int]] = []
        for chunk in self.chunks[:-1]:
            yield from self._put_kv(kv, chunk, self.kv.backward_resident)
        for chunk in reversed(self.chunks):
            self._take(layer, "input", "out", "lse", chunk=chunk)
            if chunk == self.chunks[-1]:
                # Gradients of the row's last keys are the next row's, and never leave the device.
                for earlier in range(self.kv.backward_resident, chunk - 1):
                    yield from self._hold(kv, self.kv.grads[earlier])
            self.look("backward", layer, chunk)
        self._close(kv)
