"""The last tier of the checkpoint store: bytes between CPU buffers and a file of this process, on background threads.

The file has no name, so the system frees it however the process ends. An entry is whole pages of it, which go past the
page cache (O_DIRECT) where the file system takes that and the buffer starts on a page.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE = 4096  # O_DIRECT wants addresses, lengths and offsets in multiples of a disk's block; none is larger


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """What the file system of `folder`, which need not exist yet, has left for this user."""
    status = os.statvfs(next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists()))
    return status.f_bavail * status.f_frsize


class Transfer:
    """Bytes on their way; `direct` says whether they go past the page cache."""

    def __init__(self, future: Future[None], direct: bool) -> None:
        self._future, self.direct = future, direct

    def wait(self) -> None:
        """Block the host until the bytes have arrived; raises what went wrong with them."""
        self._future.result()

    def done(self) -> bool:
        """Whether `wait()` returns, or raises, at once."""
        return self._future.done()


class DiskEntry(Transfer):
    """`nbytes` of `owner`'s file and their write: after `wait()` its buffer may be used again."""

    def __init__(self, owner: DiskFile, nbytes: int, place: tuple[int, int], write: Transfer) -> None:
        super().__init__(write._future, write.direct)
        self.nbytes, self._owner, self._place, self._uses, self._freed = nbytes, owner, place, [write._future], False


class DiskFile:
    """One file of one process in `folder`, which is made if it is missing; places are used again after `free`.

    Transfers start in the order of the calls, so each may wait for earlier ones. Buffers are contiguous 1-D uint8 on
    the CPU, else ValueError; a call after `close` raises RuntimeError. All that was asked for is carried out before
    the interpreter exits, so a `ready` has to return by itself. A folder that takes no file raises OSError.
    `direct` says whether buffers that start on a page go past the page cache, `file_bytes` the size of the file once
    its writes have ended, `peak_bytes` the largest `used_bytes` so far.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._plain_file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 (unlinked at once)
        except OSError as error:
            why = f"hf_fpdt: disk_dir={folder} takes no file ({error.strerror}); name a folder you may write to."
            raise OSError(error.errno, why) from error
        self._direct_file = _open_direct(self._plain_file)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fpdt-disk")
        self._folder, self._lock, self._closed = folder, threading.Lock(), False
        self._writes: list[Transfer] = []
        self._freed: deque[DiskEntry] = deque()
        self._places: dict[int, deque[DiskEntry]] = {}  # free ones by size, each as the entry that was there last
        self.direct, self.file_bytes, self.peak_bytes, self._used = self._direct_file is not None, 0, 0, 0

    def write(self, buffer: Tensor, ready: Callable[[], None] | None = None) -> DiskEntry:
        """Start to write `buffer` once `ready()` has returned; raises the error of an earlier one, if none did yet."""
        with self._lock:
            self._check("write", buffer)
            for write in [write for write in self._writes if write._future.done()]:
                self._writes.remove(write)
                write.wait()
            place, last_uses = self._take(_whole_pages(buffer.nbytes))
            self._writes.append(self._start(True, buffer, place[0], (lambda: wait(last_uses), ready)))
            return DiskEntry(self, buffer.nbytes, place, self._writes[-1])

    def read(self, entry: DiskEntry, buffer: Tensor, ready: Callable[[], None] | None = None) -> Transfer:
        """Start to read `entry` into `buffer` of its size, once it is written and `ready()` has returned."""
        with self._lock:
            self._check("read", buffer, entry)
            transfer = self._start(False, buffer, entry._place[0], (entry.wait, ready))
            entry._uses = [use for use in entry._uses if not use.done()] + [transfer._future]
            return transfer

    def free(self, entry: DiskEntry) -> None:
        """Give the entry's place back; its next owner waits for transfers under way. Twice raises RuntimeError."""
        self._check_entry("free", entry)
        entry._freed = True
        if not self._closed:
            self._freed.append(entry)  # no lock: the garbage collector may call this while this thread is in `write`

    @property
    def used_bytes(self) -> int:
        """Bytes of the entries that were not freed, in whole pages."""
        with self._lock:
            self._sort_freed()
            return self._used

    def close(self) -> None:
        """Carry out what was asked for, then drop the file and its entries; does nothing the second time."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            self._pool.shutdown()
            self._plain_file.truncate(0)  # a process forked from this one may keep the file open, but not its bytes
            for file in filter(None, (self._plain_file, self._direct_file)):
                file.close()
            self.file_bytes = self._used = 0
            self._freed.clear()

    def _take(self, nbytes: int) -> tuple[tuple[int, int], list[Future[None]]]:
        """(offset, size) of the smallest free place that holds `nbytes`, or of a new one; what may still use it."""
        self._sort_freed()
        self._used += nbytes
        self.peak_bytes = max(self.peak_bytes, self._used)
        fits = [size for size, entries in self._places.items() if size >= nbytes and entries]
        if fits:
            last = self._places[min(fits)].popleft()  # the one freed first: its transfers have most likely ended
            return last._place, last._uses
        self.file_bytes += nbytes
        return (self.file_bytes - nbytes, nbytes), []

    def _sort_freed(self) -> None:
        while self._freed:
            entry = self._freed.popleft()
            self._used -= _whole_pages(entry.nbytes)
            self._places.setdefault(entry._place[1], deque()).append(entry)

    def _check(self, what: str, buffer: Tensor, entry: DiskEntry | None = None) -> None:
        if self._closed:
            raise RuntimeError(f"DiskFile.{what}: the file in {self._folder} is closed; make a new DiskFile.")
        if (buffer.device.type, buffer.dtype, buffer.dim(), buffer.is_contiguous()) != ("cpu", torch.uint8, 1, True):
            got = f"{buffer.dtype}, shape {tuple(buffer.shape)}, strides {buffer.stride()}, on {buffer.device}"
            raise ValueError(f"DiskFile.{what}: the buffer is {got}; pass contiguous 1-D torch.uint8 on the CPU.")
        if entry is not None:
            self._check_entry(what, entry)
            if buffer.nbytes != entry.nbytes:
                raise ValueError(f"DiskFile.{what}: a buffer of {buffer.nbytes} bytes for {entry.nbytes}; slice it.")

    def _check_entry(self, what: str, entry: DiskEntry) -> None:
        if entry._freed or entry._owner is not self:
            why = "was freed before; free it once" if entry._freed else "is of another DiskFile; ask that one"
            raise RuntimeError(f"DiskFile.{what}: the entry of {entry.nbytes} bytes {why}.")

    def _start(self, out: bool, buffer: Tensor, offset: int, steps: tuple[Any, Any]) -> Transfer:
        direct = self._direct_file if buffer.data_ptr() % PAGE == 0 else None
        future = self._pool.submit(self._move, out, direct or self._plain_file, buffer, offset, steps)
        return Transfer(future, direct is not None)

    def _move(self, out: bool, file: FileIO, buffer: Tensor, offset: int, steps: tuple[Any, Any]) -> None:
        for step in filter(None, steps):
            step()
        data, n_rest = buffer.numpy().data, len(buffer) % PAGE
        whole, rest = data[: len(data) - n_rest], data[len(data) - n_rest :]
        last = memoryview(mmap.mmap(-1, PAGE))[: _whole_pages(n_rest)]  # filled up with zeros
        last[:n_rest] = rest
        call, views = os.pwritev if out else os.preadv, [whole, last]
        try:
            while views := [view for view in views if view]:
                # At most 2 GiB a call, and less where the disk fills up; Python repeats what a signal interrupts.
                moved = call(file.fileno(), views, offset)
                if moved == 0:
                    raise OSError(errno.EIO, "the file ends early")
                file = self._plain_file if moved % PAGE else file  # the direct one takes whole pages only
                offset += moved
                for i, view in enumerate(views):
                    views[i], moved = view[moved:], max(0, moved - len(view))
        except OSError as error:
            what, left = f"{'write' if out else 'read'} {len(data)} bytes of checkpoints", free_bytes(self._folder)
            why = f"hf_fpdt: cannot {what} in disk_dir={self._folder} ({error.strerror}), where {left} bytes are free"
            way = 'take another disk_dir, a larger device_budget_gib or host_budget_gib, or checkpoints="segment"'
            raise OSError(error.errno, f"{why}; {way}.") from error
        if not out:
            rest[:] = last[:n_rest]


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _open_direct(plain: FileIO) -> FileIO | None:
    """The same file past the page cache; None where that cannot be opened or does not take a page."""
    with suppress(OSError, AttributeError):  # AttributeError: a system without O_DIRECT
        file = FileIO(os.open(f"/proc/self/fd/{plain.fileno()}", os.O_RDWR | os.O_DIRECT), "r+")
        os.pwrite(file.fileno(), mmap.mmap(-1, PAGE), 0)
        plain.truncate(0)
        return file
    return None
