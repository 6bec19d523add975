"""One kept tensor: on the device, in pinned host memory, or in a file; all three by the same four calls.

begin()   start to bring it to the device, if it is not there; may be called early, and more than once
get()     the tensor, on the device
settle()  what was copied out is out: its device memory may be reused by what is computed from now on
free()    forget it
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..plan import Slot, TierAllocator
from .disk import Transfer
from .files import DiskStaging
from .transfers import Copy, Fetch, Transfers


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

    def __init__(self, value: Tensor, place: Slot[Tensor], allocator: TierAllocator[Tensor], name: str) -> None:
        self._value, self._version, self._name = value, value._version, name
        self._place, self._allocator = place, allocator

    def begin(self) -> None:
        """Nothing to do."""

    def get(self) -> Tensor:
        """The tensor; raises RuntimeError if it was changed."""
        if self._value._version != self._version:
            raise RuntimeError(
                f"hf_fpdt: the checkpoint {self._name} was changed in place after the forward pass; its gradient "
                "would be wrong. Change a copy instead."
            )
        return self._value

    def settle(self) -> None:
        """Nothing to do."""

    def free(self) -> None:
        """Let go of the tensor; the store may still remember the entry as a read to come."""
        del self._value
        self._allocator.leave(self._place)


class HostEntry:
    """A copy in one pinned buffer; K, V and the sums of their gradients take this road too, and are written again."""

    def __init__(
        self, value: Tensor, place: Slot[Tensor], allocator: TierAllocator[Tensor], transfers: Transfers
    ) -> None:
        assert place.buffer is not None
        self._place, self._allocator, self._transfers = place, allocator, transfers
        self._buffer, self._shape, self._dtype = place.buffer, value.shape, value.dtype
        self._copy: Copy = transfers.to_host(value, place.buffer)
        self._fetch: Fetch | None = None

    def write(self, value: Tensor) -> None:
        """Start to copy a value out, in place of the one before; its memory may be reused once that is settled."""
        self._copy.settle()
        self._copy = self._transfers.to_host(value, self._buffer)

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
        self._allocator.leave(self._place)


class DiskTierEntry:
    """A copy in the file."""

    def __init__(
        self, value: Tensor, place: Slot[Tensor], allocator: TierAllocator[Tensor], files: DiskStaging
    ) -> None:
        self._place, self._allocator, self._files = place, allocator, files
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
        self._allocator.leave(self._place)
