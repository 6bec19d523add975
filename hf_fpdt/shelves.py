"""Which tier an entry of the stores goes to, and a whole step played through in whole numbers; no torch.

Three tiers: device memory, pinned host memory, files. Stores place real buffers by the rules of this file, and the
planner plays the same rules with plain numbers for buffers, so what it foretells is what they allocate, to the byte.

The last layers are needed first, so they go to the device; what the device cannot hold goes to the host, and what
neither holds, the first layers, to files. What backward rebuilds is needed soon: device first.
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
SOON: tuple[Tier, ...] = ("device", "host", "disk")


def page_rounded(nbytes: int) -> int:
    """The next multiple of a page: what pinning and direct I/O want, and less than 0.1 % of any real entry."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True)
class Budgets:
    """Bytes that each tier may hold on this rank.

    Attributes:
        kv: of the host's, those that checkpoints leave to K and V; where there is no further tier that is left to the
            plan.
    """

    device: int
    host: int
    disk: int = 0
    kv: int = 0

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

        A somewhat longer buffer serves too, so that the odd last chunks of other lengths do not add up; a much longer
        one, which something else will need, only where there is no room for a new one.
        """
        size, is_free = self._choice(nbytes)
        if is_free:
            return size, self._free[size].pop()
        if self.nbytes + size > self.limit:
            return None
        self.made[size] += 1
        return size, self._make(size)

    def size_for(self, nbytes: int) -> int:
        """Size of the buffer that `take` would hand out or make."""
        return self._choice(nbytes)[0]

    def _choice(self, nbytes: int) -> tuple[int, bool]:
        """(size, whether a buffer of it is free) for `nbytes`."""
        size = page_rounded(nbytes)
        free = min((free for free, buffers in self._free.items() if buffers and free >= nbytes), default=None)
        if free is None or (free > LONGER * size and self.nbytes + size <= self.limit):
            return size, False
        return free, True

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
    """Where one entry lies: `buffer` on the host alone, its `size` there, and whether it is of K and V."""

    tier: Tier
    nbytes: int
    size: int = 0
    buffer: T | None = None
    kv: bool = False


class Shelves(Generic[T]):
    """The three tiers: what is used of each, and the most that was."""

    def __init__(self, budgets: Budgets, pool: BufferPool[T]) -> None:
        self.budgets, self.pool = budgets, pool
        self._kv_bytes = 0  # buffers of K and V
        self.used: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def place(self, nbytes: int, order: tuple[Tier, ...] = SOON) -> Place[T] | None:
        """A checkpoint's place on the first tier of `order` that has room; None where none has."""
        for tier in order:
            if tier == "host":
                kept = self.pool.used_bytes - self._kv_bytes + self.pool.size_for(nbytes)
                place = self._on_host(nbytes) if kept <= self.budgets.host - self.budgets.kv else None
            else:
                limit = self.budgets.device if tier == "device" else self.budgets.disk
                place = Place[T](tier, nbytes) if self.used[tier] + nbytes <= limit else None
            if place is not None:
                return self._taken(place)
        return None

    def place_kv(self, nbytes: int) -> Place[T] | None:
        """A place for K or V, or for their gradients, on the host; None where there is no room."""
        place = self._on_host(nbytes, kv=True)
        if place is not None:
            self._kv_bytes += place.size
            self._taken(place)
        return place

    def _on_host(self, nbytes: int, *, kv: bool = False) -> Place[T] | None:
        taken = self.pool.take(nbytes)
        return None if taken is None else Place("host", nbytes, *taken, kv=kv)

    def _taken(self, place: Place[T]) -> Place[T]:
        self.used[place.tier] += place.nbytes
        self.peak[place.tier] = max(self.peak[place.tier], self.used[place.tier])
        return place

    def leave(self, place: Place[T]) -> None:
        """The entry is gone."""
        self.used[place.tier] -= place.nbytes
        if place.buffer is not None:
            self._kv_bytes -= place.size * place.kv
            self.pool.give(place.size, place.buffer)


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
        near = self.budgets.device + self.budgets.host - self.budgets.kv
        return ("host", "device", "disk") if left <= near else ("disk", "host")


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


@dataclass(frozen=True)
class Forecast:
    """What a step takes.

    Attributes:
        kept: the plan.
        device_bytes: most that checkpoints hold on the device.
        host_bytes: all pinned buffers.
        disk_bytes: most that files hold.
        new_buffers: sizes of the pinned buffers that are not there yet, and how many of each.
    """

    kept: Kept
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    new_buffers: Mapping[int, int] = field(default_factory=dict)


def forecast(kept: Kept, sizes: LayerBytes, kv: KVBytes, budgets: Budgets, have: Mapping[int, int]) -> Forecast | None:
    """Play a step: every layer forward, then every layer backward; None where the budgets do not hold it.

    Args:
        budgets: `device` is what checkpoints may take of it, without K and V.
        have: sizes of the pinned buffers that exist, and how many of each.
    """
    pool: BufferPool[int] = BufferPool(lambda size: size, budgets.host)
    for size, count in have.items():
        for _ in range(count):
            pool.add(size, size)
    step = _Step(kept, sizes, kv, Shelves(budgets, pool))
    if not all(step.play()):
        return None
    peak = step.shelves.peak
    new = pool.made - Counter(have)
    return Forecast(kept, peak["device"], pool.nbytes, peak["disk"], dict(new))


class _Step:
    """The puts and takes of one step, in the order in which the executor makes them; each yields whether it fits."""

    def __init__(self, kept: Kept, sizes: LayerBytes, kv: KVBytes, shelves: Shelves[int]) -> None:
        self.kept, self.sizes, self.kv, self.shelves = kept, sizes, kv, shelves
        self.order = ForwardOrder(forward_bytes(kept, sizes), shelves.budgets)
        self.places: dict[tuple[int, str, int], Place[int]] = {}
        self.chunks = range(len(sizes.inputs))

    def play(self) -> Iterator[bool]:
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
        self._close(kv)
