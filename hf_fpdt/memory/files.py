"""Tensors on their way to a file and back, through pinned buffers of the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from ..plan import STAGING_BUFFERS
from .disk import DiskEntry, DiskFile, Transfer
from .pinned import PinnedMemory
from .transfers import Copy, Transfers


@dataclass(frozen=True)
class _Staging:
    """A buffer between device and file, and the copy that may still read it: the file's threads wait for it."""

    buffer: Tensor
    leaving: Copy | None = None


class DiskStaging:
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

        One more is made where all are being read into, or no plan predicted that files would be used.
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
