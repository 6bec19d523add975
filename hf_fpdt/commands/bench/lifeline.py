"""What a child's standard input says: a byte, that its job is there; the end, that its parent is gone. No torch.

The byte is never taken, as torch's launcher gives all processes of a job the same input.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from threading import Thread


def is_wanted() -> bool:
    """Wait for the byte; False where the input ends without one. From then on this process goes with its parent."""
    wanted = bool(_wait_for(select.POLLIN) & select.POLLIN)
    if wanted:
        Thread(target=_go_with_parent, daemon=True).start()
    return wanted


def _go_with_parent() -> None:
    """With all that it started: nothing else may find the GPU busy."""
    _wait_for(0)
    os.killpg(0, signal.SIGKILL)


def _wait_for(events: int) -> int:
    """What came of standard input; its end always counts."""
    standard_input = select.poll()
    standard_input.register(sys.stdin.fileno(), events)
    ((_, event),) = standard_input.poll()
    return event
