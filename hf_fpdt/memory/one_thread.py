"""One thread at a time in the layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OneThread:
    """Lets one thread in at a time, however deep; another is refused, not made to wait.

    Which one it is may change from layer to layer: on a GPU autograd runs backward passes in a thread of its own.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), ""

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """Be in the layer called `name`.

        Raises:
            RuntimeError: another thread is in a layer.
        """
        thread = threading.current_thread().name
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"hf_fpdt: this model is already running a step in another thread: {thread!r} came to {name} while "
                f"{self._inside}. All layers share the memory of a step: run one step at a time, or give each thread "
                "a model of its own. On several GPUs start one process each (accelerate launch), not nn.DataParallel."
            )
        try:
            self._inside = f"{thread!r} is in {name}"
            yield
        finally:
            self._lock.release()
