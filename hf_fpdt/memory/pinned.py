"""Pinned host memory: regions that stay pinned, and buffers that are cut out of them anew for each length of sequence.

Pinning takes longer than copying (0.1 to 0.65 s a GiB were seen), cutting takes nothing. So what is pinned serves
steps of every length; a region is given up only where buffers would leave too much of it unused.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..units import page_rounded

REGION_BYTES = 4 * 2**30  # memory is pinned in parts of this size, so that progress shows
NEVER_WRITTEN = 255  # NaN in every floating type: what nobody wrote shows


@dataclass
class _Region:
    """Memory that is pinned as one; its first `cut` bytes belong to buffers."""

    memory: Tensor
    cut: int = 0


@dataclass(frozen=True)
class Cuts:
    """Where buffers go.

    Attributes:
        parts: of each region that stays, by its number: sizes of the buffers cut out of it, in order.
        rest: sizes that no region has room for.
    """

    parts: Mapping[int, Sequence[int]]
    rest: Sequence[int]


def cuts_of(sizes: Sequence[int], regions: Sequence[tuple[int, int]], limit: int) -> Cuts:
    """Each size in the first region with room for it; regions go where they and the rest would be more than `limit`.

    Those go first of which most would be left over, and none that has buffers.

    Args:
        sizes: of buffers; longest first wastes least.
        regions: (length, bytes of it that belong to buffers) of each.
        limit: bytes of all regions together, those of the rest among them.
    """
    staying = dict(enumerate(regions))
    while True:
        cuts = _first_fit(sizes, {number: length - cut for number, (length, cut) in staying.items()})
        over = sum(length for length, _ in staying.values()) + sum(cuts.rest) - limit
        unused = {number: length - sum(cuts.parts[number]) for number, (length, cut) in staying.items() if not cut}
        if over <= 0 or not any(unused.values()):
            return cuts
        del staying[max(unused, key=unused.__getitem__)]


def _first_fit(sizes: Sequence[int], rooms: dict[int, int]) -> Cuts:
    parts: dict[int, list[int]] = {number: [] for number in rooms}
    rest = []
    for size in sizes:
        number = next((number for number, room in rooms.items() if room >= size), None)
        if number is None:
            rest.append(size)
        else:
            parts[number].append(size)
            rooms[number] -= size
    return Cuts(parts, rest)


class PinnedMemory:
    """Host memory in regions of exact size, registered with the driver where there is a GPU.

    PyTorch's own pinned allocator rounds every block up to a power of two, which costs up to half of the host.

    Attributes:
        limit: bytes of all regions together; regions without buffers are given up for others before it is passed.
        seconds: spent on pinning so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.limit, self.seconds = 2**62, 0.0
        self._pin = device.type == "cuda"
        self._regions: list[_Region] = []
        # A model that is simply dropped gives its memory back too. At exit the driver does so.
        weakref.finalize(self, _unregister, self._regions, pinned=self._pin).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of all regions."""
        return sum(region.memory.numel() for region in self._regions)

    @property
    def gap_bytes(self) -> int:
        """Bytes of regions with buffers that belong to none."""
        return sum(region.memory.numel() - region.cut for region in self._regions if region.cut)

    def buffer(self, nbytes: int) -> Tensor:
        """One page-aligned buffer (uint8), in whole pages."""
        ((_, buffer),) = self.buffers({page_rounded(nbytes): 1})
        return buffer

    def buffers(self, counts: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
        """(size, buffer) for `counts` buffers of each page-rounded size; with a progress line for what is pinned."""
        sizes = [size for size, count in sorted(counts.items(), reverse=True) for _ in range(count)]
        cuts = cuts_of(sizes, [(region.memory.numel(), region.cut) for region in self._regions], self.limit)
        _unregister(self._regions, pinned=self._pin, but=cuts.parts.keys())
        for region, part in zip(self._regions, cuts.parts.values(), strict=True):
            yield from _cut(region, part)
        rest, total = list(cuts.rest), sum(cuts.rest)
        what = "hf_fpdt: pinning host memory" if self._pin else "hf_fpdt: host memory"
        # disable=None: quiet where there is no terminal. Small amounts are there at once.
        quiet = None if total > 2**30 else True
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=what, disable=quiet) as bar:
            while rest:
                part = _first(rest, REGION_BYTES)
                del rest[: len(part)]
                yield from _cut(self._new_region(sum(part)), part)
                bar.update(sum(part))

    def recut(self) -> None:
        """All regions may be cut anew; every buffer was given back, so that [Note: reuse of host buffers] holds."""
        for region in self._regions:
            region.cut = 0

    def _new_region(self, nbytes: int) -> _Region:
        began = time.perf_counter()
        # MAP_PRIVATE: huge pages for shared memory are off on most systems.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # pinning is counted in pages
        region = _Region(torch.frombuffer(pages, dtype=torch.uint8))
        region.memory.fill_(NEVER_WRITTEN)  # on all cores; the driver would touch page after page on one
        if self._pin:
            _register(region.memory)
        self._regions.append(region)
        self.seconds += time.perf_counter() - began
        return region

    def release(self) -> None:
        """Give everything back to the system; buffers that somebody still holds stay valid but are not pinned."""
        _unregister(self._regions, pinned=self._pin)


def _cut(region: _Region, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    for size in sizes:
        region.cut += size
        yield size, region.memory[region.cut - size : region.cut]


def _register(memory: Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code):
        raise RuntimeError(
            f"hf_fpdt: the driver could not pin {memory.numel() / 2**30:.1f} GiB of host memory (CUDA error "
            f"{int(code)}); lower FPDTPlugin(host_budget_gib=...) or raise the limit on locked memory (ulimit -l)."
        )


def _unregister(regions: list[_Region], *, pinned: bool, but: Collection[int] = ()) -> None:
    going = [region for number, region in enumerate(regions) if number not in but]
    for region in going if pinned else ():
        # The driver waits for copies that still use it.
        torch.cuda.cudart().cudaHostUnregister(region.memory.data_ptr())
    regions[:] = [region for number, region in enumerate(regions) if number in but]


def _first(sizes: list[int], limit: int) -> list[int]:
    """The first sizes that fill at most `limit` together, at least one."""
    count, total = 1, sizes[0]
    while count < len(sizes) and total + sizes[count] <= limit:
        total += sizes[count]
        count += 1
    return sizes[:count]
