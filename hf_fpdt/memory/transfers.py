"""Streams and events: the only file that knows them. Everything else asks a store.

Copies run beside the computation, one stream each way. Device memory always belongs to the computation's stream: a
copy waits for what was computed before it was asked for, and nothing that a copy reads or writes is let go of before
the computation's stream has waited for that copy. So no `record_stream` is needed, memory is reused as early as it can
be, and the peak does not depend on timing. Without CUDA the same calls copy at once.

[Note: reuse of host buffers] A buffer is given back once the computation's stream waits for the copy that read it, and
the next copy into it waits for the computation's stream: it cannot be overwritten while it is read. Copies out of the
device run in the order in which they were asked for, so a buffer given back unread is not written twice at once.
Threads that fill a buffer from a file are on no stream: they wait for the copy itself.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Mark:
    """A place on the computation's stream, after all that was handed to it so far; without CUDA that is done."""

    def __init__(self) -> None:
        self._event = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

    def is_passed(self) -> bool:
        """Whether the GPU has come past it; nobody waits."""
        return self._event is None or bool(self._event.query())


class Copy:
    """One copy under way. `source` is kept alive until the computation's stream has waited for the copy."""

    def __init__(self, source: Tensor | None, event: Any) -> None:
        self._source, self.event = source, event

    def settle(self) -> None:
        """The computation's stream waits for the copy; its source may be reused after that."""
        if self._source is not None and self.event is not None:
            torch.cuda.current_stream(self._source.device).wait_event(self.event)
        self._source = None

    def wait(self) -> None:
        """The HOST waits for the copy; for the threads that read and write files."""
        while self.event is not None and not self.event.query():
            time.sleep(0.0005)


class Fetch:
    """A device tensor that `copy` is filling."""

    def __init__(self, filled: Tensor, source: Tensor, event: Any) -> None:
        self.copy, self._filled = Copy(filled, event), filled
        self._source = source  # never read; host memory that nobody holds might be unmapped under the copy

    def tensor(self) -> Tensor:
        """The tensor; what is computed from now on sees it filled."""
        self.copy.settle()
        return self._filled


class Transfers:
    """Copies between one device and host memory, each direction on a stream of its own.

    Args:
        device: the device of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        # Two, because the link moves bytes both ways at once.
        self.into_device: Any = torch.cuda.Stream(device) if on_gpu else None
        self.out_of_device: Any = torch.cuda.Stream(device) if on_gpu else None

    def to_host(self, source: Tensor, buffer: Tensor) -> Copy:
        """Start to copy a device tensor into the first bytes of a host buffer (uint8)."""
        source = source.detach().contiguous()
        event = self._copy(self.out_of_device, typed(buffer, source.shape, source.dtype), source)
        return Copy(source, event)

    def to_device(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, after: Copy | None) -> Fetch:
        """Start to copy the first bytes of a host buffer into a new device tensor, once the copy `after` is done."""
        source = typed(buffer, shape, dtype)
        filled = torch.empty(shape, dtype=dtype, device=self.device)
        if after is not None and after.event is not None:
            self.into_device.wait_event(after.event)
        return Fetch(filled, source, self._copy(self.into_device, filled, source))

    def _copy(self, stream: Any, target: Tensor, source: Tensor) -> Any:
        if stream is None:
            target.copy_(source)
            return None
        # What made the source, and what last used the target's memory, was asked for before.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


def typed(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The first bytes of a byte buffer as a tensor."""
    return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
