"""K, V, dK, dV of the chunks that the device does not hold: pinned host buffers, fetched one chunk ahead.

A chunk is on the device while its row or the one before uses it: just put there by a forward pass, or the last one
that the row before read. So every row finds its diagonal there, and its first fetch hides under the diagonal's kernel.
The sums of gradients travel with K and V; those of a chunk that no later row reads never leave the device again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import accumulation_dtype
from ..plan import Slot, TierAllocator
from .entries import HostEntry
from .transfers import Transfers

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HostMemory:
    """Where chunks go, and what brings them."""

    transfers: Transfers
    allocator: TierAllocator[Tensor]


class _PairEntry:
    """Two tensors of one shape and dtype on the host; each takes the road of every checkpoint there, `HostEntry`."""

    def __init__(self, memory: HostMemory, pair: Pair) -> None:
        self._entries: list[HostEntry] = []
        try:
            for part in pair:
                place = _place(memory.allocator, part.numel() * part.element_size())
                self._entries.append(HostEntry(part, place, memory.allocator, memory.transfers))
        except RuntimeError:
            self.free()  # nobody else knows the first
            raise

    def write(self, pair: Pair) -> None:
        """Start to copy a pair out, in place of the one before; its memory may be reused once that is settled."""
        for part, entry in zip(pair, self._entries, strict=True):
            entry.write(part)

    def settle(self) -> None:
        """The computation waits for the copies out."""
        for entry in self._entries:
            entry.settle()

    def begin(self) -> None:
        """Start to copy both in."""
        for entry in self._entries:
            entry.begin()

    def get(self) -> Pair:
        """Both, on the device."""
        first, second = (entry.get() for entry in self._entries)
        return first, second

    def free(self) -> None:
        """Give the buffers back."""
        for entry in self._entries:
            entry.free()


def _place(allocator: TierAllocator[Tensor], nbytes: int) -> Slot[Tensor]:
    place, pool = allocator.place_kv(nbytes), allocator.kv_pool
    if place is None:
        raise RuntimeError(
            f"hf_fpdt: no host memory is left for K and V: {nbytes / 2**20:.0f} MiB more are needed, and "
            f"{pool.used_bytes / 2**30:.1f} of {pool.limit / 2**30:.1f} GiB are in use. Raise "
            "FPDTPlugin(host_budget_gib=...) or device_budget_gib, or train fewer sequences at once."
        )
    return place


@dataclass
class _OnDevice:
    """One chunk's K and V, and the sums of their gradients where there are any yet."""

    kv: Pair
    grads: Pair | None = None


@dataclass
class _Coming:
    """One chunk that is on its way to the device."""

    kv: _PairEntry
    grads: _PairEntry | None

    def arrived(self) -> _OnDevice:
        return _OnDevice(self.kv.get(), None if self.grads is None else self.grads.get())


class StreamedKV:
    """K and V of streamed chunks by index, each [B, S, G, H of K or V], and the sums of their gradients.

    Args:
        host: where they go.
    """

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        self._kv: dict[int, _PairEntry] = {}
        self._grads: dict[int, _PairEntry] = {}
        self._here: dict[int, _OnDevice] = {}  # the row's diagonal and the chunk used last
        self._diagonal = -1
        self._coming: dict[int, _Coming] = {}
        self._leaving: deque[_PairEntry] = deque()
        self._complete: dict[int, Pair] = {}

    def put(self, index: int, kv: Pair, *, is_read_later: bool) -> None:
        """Keep K and V of a chunk, and have them at hand for its row.

        Args:
            is_read_later: by other rows than its own; else they are not copied out.
        """
        kv = kv[0].contiguous(), kv[1].contiguous()
        # Between two rows a backward pass may bring chunks, and the upper row has left sums for the lower one here.
        self._here = {other: chunk for other, chunk in self._here.items() if chunk.grads is not None}
        self._here[index], self._diagonal = _OnDevice(kv), index
        if is_read_later:
            self._kv[index] = _PairEntry(self._host, kv)
            self._leave(self._kv[index])

    def start_row(self, diagonal: int) -> None:
        """A row begins whose diagonal is this chunk; it stays on the device until the next one begins."""
        self._here = {index: chunk for index, chunk in self._here.items() if index == diagonal}
        self._diagonal = diagonal

    def begin(self, index: int, *, with_grads: bool) -> None:
        """Start to fetch a chunk, unless it is here or coming."""
        if index in self._here or index in self._coming:
            return
        coming = _Coming(self._kv[index], self._grads.get(index) if with_grads else None)
        for entry in (coming.kv, coming.grads):
            if entry is not None:
                entry.begin()
        self._coming[index] = coming

    def get(self, index: int, *, with_grads: bool) -> Pair:
        """K and V of a chunk on the device."""
        if index not in self._here:
            self.begin(index, with_grads=with_grads)
            self.start_row(self._diagonal)  # let go of the chunk before
            self._here[index] = self._coming.pop(index).arrived()
        return self._here[index].kv

    def add_grad(self, index: int, place: slice, grads: Pair, *, complete: bool, stays: bool) -> None:
        """Add to the sums of the chunk at hand.

        Args:
            place: the keys that the gradients are of.
            complete: no later row reads the chunk; `take_grad` follows.
            stays: the next row begins with it, so its sums need not leave.
        """
        chunk = self._here[index]
        if chunk.grads is None and grads[0].shape[1] == chunk.kv[0].shape[1]:
            chunk.grads = accumulator(grads[0]), accumulator(grads[1])
        else:
            if chunk.grads is None:
                chunk.grads = zeros_for(chunk.kv[0]), zeros_for(chunk.kv[1])
            for total, part in zip(chunk.grads, grads, strict=True):
                total[:, place].add_(part)
        if complete:
            self._complete[index] = chunk.grads
        elif not stays:
            if index in self._grads:
                self._grads[index].write(chunk.grads)
            else:
                self._grads[index] = _PairEntry(self._host, chunk.grads)
            self._leave(self._grads[index])

    def take_grad(self, index: int) -> Pair | None:
        """The complete sums of a chunk, once."""
        self._here.pop(index, None)
        return self._complete.pop(index, None)

    def _leave(self, entry: _PairEntry) -> None:
        """Its copies have just begun; the ones before had a kernel's time, and the computation waits for them."""
        self._leaving.append(entry)
        while len(self._leaving) > 1:
            self._leaving.popleft().settle()

    def close(self) -> None:
        """Settle every copy and give the host buffers back."""
        for entry in (*self._kv.values(), *self._grads.values()):
            entry.free()
        self._leaving.clear()
        self._kv, self._grads, self._here, self._coming, self._complete = {}, {}, {}, {}, {}


def accumulator(grad: Tensor) -> Tensor:
    """A gradient in the dtype in which it adds up over rows, in memory of its own."""
    wide = accumulation_dtype(grad.dtype)
    return grad.to(wide, memory_format=torch.contiguous_format, copy=True)


def zeros_for(part: Tensor) -> Tensor:
    """An empty sum of gradients of K or V."""
    return torch.zeros(part.shape, dtype=accumulation_dtype(part.dtype), device=part.device)
