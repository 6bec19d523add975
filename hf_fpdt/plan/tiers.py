"""Which tier an entry of the stores goes to. Integers only; no torch.

Three tiers: device memory, pinned host memory, files. Stores place real buffers by the rules of this file, and
`rehearsal` plays the same rules with plain numbers for buffers, so what it predicts is what they allocate, to the
byte.

The last layers are needed first, so they go to the device; what the device cannot hold goes to the host, and what
neither holds, the first layers, to files. What backward rebuilds is needed soon: device first. K and V that the device
does not hold have host buffers of their own, which checkpoints neither crowd out nor waste on a small lse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from ..units import page_rounded

# Reads under way at a time: one chunk's input, attention output and lse.
LOOKAHEAD = 3
# Pinned buffers between device and file: writes under way, and the reads above.
STAGING_BUFFERS = 4 + LOOKAHEAD
LONGER = 1.5
T = TypeVar("T")
Tier = Literal["device", "host", "disk"]
Observer = Callable[[Literal["forward", "rebuild", "backward"], int, int], None]
SOON: tuple[Tier, ...] = ("device", "host", "disk")


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
class Slot(Generic[T]):
    """Where one entry lies: `buffer` on the host alone, its `size` there and the `pool` that it is of."""

    tier: Tier
    nbytes: int
    size: int = 0
    buffer: T | None = None
    pool: BufferPool[T] | None = None


class TierAllocator(Generic[T]):
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

    def place(self, nbytes: int, order: tuple[Tier, ...] = SOON) -> Slot[T] | None:
        """A place on the first tier of `order` that has room; None where none has."""
        for tier in order:
            place = self._on(tier, nbytes)
            if place is not None:
                return self._counted(place)
        return None

    def place_kv(self, nbytes: int) -> Slot[T] | None:
        """A host buffer for K, V or a gradient of them; None where there is no room."""
        place = self._buffer(self.kv_pool, nbytes)
        return None if place is None else self._counted(place)

    def _counted(self, place: Slot[T]) -> Slot[T]:
        self.used[place.tier] += place.nbytes
        self.peak[place.tier] = max(self.peak[place.tier], self.used[place.tier])
        return place

    @staticmethod
    def _buffer(pool: BufferPool[T], nbytes: int) -> Slot[T] | None:
        taken = pool.take(nbytes)
        return None if taken is None else Slot("host", nbytes, *taken, pool)

    def _on(self, tier: Tier, nbytes: int) -> Slot[T] | None:
        if tier == "host":
            return self._buffer(self.pool, nbytes)
        limit = self.budgets.device if tier == "device" else self.budgets.disk
        return Slot(tier, nbytes) if self.used[tier] + nbytes <= limit else None

    def leave(self, place: Slot[T]) -> None:
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
class ExistingBuffers:
    """Sizes of the pinned buffers that exist, and how many of each: of checkpoints, and of K and V."""

    checkpoints: Mapping[int, int] = field(default_factory=dict)
    kv: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.kv)
