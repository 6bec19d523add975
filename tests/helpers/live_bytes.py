"""Bytes of tensors alive on the CPU, as a GPU's allocator would count them; pinned buffers are not among them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made by operations while it is active, from the first operation that returns them to their end.

    Attributes:
        now, peak: bytes alive, and the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # bytes of storages that are alive, 0 of those that do not count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                self._ignore(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        """What was there before, weights and pinned buffers, does not count."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._remember(storage, 0)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._remember(storage, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _remember(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        self._known[key] = nbytes
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count inside."""
    with LiveBytes() as counter:
        yield counter
