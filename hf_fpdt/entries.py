"""One kept tensor: on the device, in pinned host memory, or in a file; all three by the same four calls.

begin()   start to bring it to the device, if it is not there; may be called early, and more than once
get()     the tensor, on the device
settle()  what was copied out is out: its device memory may be reused by what is computed from now on
free()    forget it
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .disk import DiskEntry, DiskFile, Transfer
from .offload import Copy, Fetch, Transfers
from .pinned import PinnedMemory
from .shelves import Place, Shelves

# Reads under way at a time: one chunk's input, attention output and lse.
LOOKAHEAD = 3
# Pinned buffers between device and file: writes under way, and the reads above.
STAGING_BUFFERS = 4 + LOOKAHEAD


class Entry(Protocol):
    """A kept tensor, wherever it lies."""

    def begin(self) -> None:
        """Start to bring it to the device."""

    def get(self) -> Tensor:
        """It, on the device."""
        ...

    def settle(self) -> None:
        """The device memory that it was copied from may be reused."""

    def free(self) -> None:
        """Forget it."""


class DeviceEntry:
    """The tensor itself. It is not a copy, so it is checked that nobody wrote to it since."""

    def __init__(self, value: Tensor, place: Place[Tensor], shelves: Shelves[Tensor], name: str) -> None:
        self._value, self._version, self._name = value, value._version, name
        self._place, self._shelves = place, shelves

    def begin(self) -> None:
        """Nothing to do."""

    def get(self) -> Tensor:
        """The tensor; raises RuntimeError if it was changed."""
        if self._value._version != self._version:
            raise RuntimeError(
                f"The checkpoint {self._name} was changed in place after the forward pass; its gradient would be "
                "wrong. Change a copy instead."
            )
        return self._value

    def settle(self) -> None:
        """Nothing to do."""

    def free(self) -> None:
        """Let go of the tensor; the store may still remember the entry as a read to come."""
        del self._value
        self._shelves.leave(self._place)


class HostEntry:
    """A copy in one pinned buffer."""

    def __init__(self, value: Tensor, place: Place[Tensor], shelves: Shelves[Tensor], transfers: Transfers) -> None:
        assert place.buffer is not None
        self._place, self._shelves, self._transfers = place, shelves, transfers
        self._buffer, self._shape, self._dtype = place.buffer, value.shape, value.dtype
        self._copy: Copy = transfers.to_host(value, place.buffer)
        self._fetch: Fetch | None = None

    def begin(self) -> None:
        """Start to copy it in."""
        if self._fetch is None:
            self._fetch = self._transfers.to_device(self._buffer, self._shape, self._dtype, after=self._copy)

    def get(self) -> Tensor:
        """It, on the device; the next call fetches it again."""
        self.begin()
        assert self._fetch is not None
        value, self._fetch = self._fetch.tensor(), None
        return value

    def settle(self) -> None:
        """The computation waits for the copy out."""
        self._copy.settle()

    def free(self) -> None:
        """Give the buffer back; a copy under way is waited for, so that its memory is not reused too early."""
        self._copy.settle()
        if self._fetch is not None:
            self.get()
        self._shelves.leave(self._place)


@dataclass(frozen=True)
class _Staging:
    """A buffer between device and file, and the copy that may still read it: the file's threads wait for it."""

    buffer: Tensor
    leaving: Copy | None = None


class Files:
    """The file of one process, and the pinned buffers through which bytes go to it and come back.

    Args:
        folder: `FPDTPlugin.disk_dir`.
    """

    def __init__(self, folder: str, transfers: Transfers) -> None:
        self.file, self.transfers, self.pinned = DiskFile(folder), transfers, PinnedMemory(transfers.device)
        self._free: deque[_Staging] = deque()
        self._writing: deque[tuple[DiskEntry, Tensor]] = deque()
        self._longest = 0

    def stage_for(self, nbytes: int) -> None:
        """Have staging buffers for entries of up to `nbytes`; shorter ones are let go of."""
        if nbytes > self._longest:
            self._begin_staging(nbytes)
            self._free.extend(_Staging(self.pinned.buffer(nbytes)) for _ in range(STAGING_BUFFERS))

    def _begin_staging(self, nbytes: int) -> None:
        for written, _ in self._writing:
            written.wait()
        self._writing.clear()
        self._free.clear()
        self.pinned.release()
        self._longest = nbytes

    def staging(self, nbytes: int) -> _Staging:
        """A buffer of at least `nbytes`; where all are in use, the host waits for the oldest write.

        One more is made where all are being read into, or no plan foretold that files would be used.
        """
        if nbytes > self._longest:
            self._begin_staging(nbytes)
        while self._writing and (self._writing[0][0].done() or not self._free):
            written, buffer = self._writing.popleft()
            written.wait()
            self._give(_Staging(buffer), first=True)
        return self._free.popleft() if self._free else _Staging(self.pinned.buffer(self._longest))

    def write(self, value: Tensor) -> tuple[DiskEntry, Copy]:
        """Start to write a device tensor by way of a staging buffer."""
        nbytes = value.numel() * value.element_size()
        # No wait for who read it: copies out come after what the computation has waited for.
        buffer = self.staging(nbytes).buffer
        copy = self.transfers.to_host(value, buffer)
        entry = self.file.write(buffer[:nbytes], ready=copy.wait)
        self._writing.append((entry, buffer))
        return entry, copy

    def read(self, entry: DiskEntry) -> tuple[Transfer, Tensor]:
        """Start to read an entry into a staging buffer."""
        staging = self.staging(entry.nbytes)
        ready = None if staging.leaving is None else staging.leaving.wait
        return self.file.read(entry, staging.buffer[: entry.nbytes], ready), staging.buffer

    def give(self, buffer: Tensor, leaving: Copy | None = None) -> None:
        """A staging buffer is free again, once the copy out of it is done."""
        self._give(_Staging(buffer, leaving))

    def _give(self, staging: _Staging, *, first: bool = False) -> None:
        if staging.buffer.numel() >= self._longest:
            self._free.appendleft(staging) if first else self._free.append(staging)

    def close(self) -> None:
        """Drop the file and the buffers."""
        self.file.close()
        self.pinned.release()


class DiskTierEntry:
    """A copy in the file."""

    def __init__(self, value: Tensor, place: Place[Tensor], shelves: Shelves[Tensor], files: Files) -> None:
        self._place, self._shelves, self._files = place, shelves, files
        self._shape, self._dtype = value.shape, value.dtype
        self._entry, self._copy = files.write(value)
        self._reading: tuple[Transfer, Tensor] | None = None

    def begin(self) -> None:
        """Start to read it into a staging buffer."""
        if self._reading is None:
            self._reading = self._files.read(self._entry)

    def get(self) -> Tensor:
        """It, on the device; the host waits for the file."""
        self.begin()
        assert self._reading is not None
        transfer, buffer = self._reading
        transfer.wait()
        fetch = self._files.transfers.to_device(buffer, self._shape, self._dtype, after=None)
        value = fetch.tensor()
        self._files.give(buffer, fetch.copy)
        self._reading = None
        return value

    def settle(self) -> None:
        """The computation waits for the copy out of the device."""
        self._copy.settle()

    def free(self) -> None:
        """Give the place in the file back."""
        self._copy.settle()
        if self._reading is not None:
            transfer, buffer = self._reading
            transfer.wait()
            self._files.give(buffer)
        self._files.file.free(self._entry)
        self._shelves.leave(self._place)
