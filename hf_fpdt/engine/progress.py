"""One line inside a long step: which layer and chunk, how fast, how long still. Quiet where there is no terminal.

The host runs ahead of the GPU, by more than a layer at times: each part is marked on the GPU's stream, and the line
counts those that the GPU has come past. Nobody waits for a mark.
"""

from __future__ import annotations

import os
from collections import deque
from typing import NamedTuple

from tqdm import tqdm

from ..memory import Mark

SECONDS = 0.5  # between two looks of the line
FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"


class _Part(NamedTuple):
    """Work that was handed to the GPU, the place after it, and what is next."""

    mark: Mark
    operations: float
    strict: float
    next: str


class StepProgress:
    """The line of one model on one process.

    Args:
        peak: operations a second that MFU is measured against; None: MFU is not shown.
    """

    def __init__(self, peak: float | None = None) -> None:
        self._peak = peak
        self._bar: tqdm | None = None
        self._strict = self._handed = 0.0
        self._parts: deque[_Part] = deque()

    def begin(self, operations: float) -> None:
        """A step of so many operations begins; a line that is still there is of a step that was given up."""
        self.close()
        # disable=None: quiet where stderr is no terminal. Of several processes the first one speaks.
        quiet = True if os.environ.get("RANK", "0") != "0" else None
        # miniters: every part may show, a small one after large ones too. smoothing: the time left goes by the whole
        # step so far, since a layer that runs again makes single seconds misleading.
        self._bar = tqdm(
            total=operations,
            bar_format=FORMAT,
            leave=False,
            mininterval=SECONDS,
            miniters=0,
            smoothing=0,
            disable=quiet,
        )
        self._strict = self._handed = 0.0
        self._parts.clear()

    def advance(self, operations: float, strict: float, what: str) -> None:
        """So many operations were handed to the GPU, `strict` of them needed by the model; `what` is next."""
        if self._bar is None or self._bar.disable:
            return
        self._handed += operations
        self._parts.append(_Part(Mark(), operations, strict, what))
        while self._parts and self._parts[0].mark.is_passed():
            self._show(self._parts.popleft(), self._bar)
        if self._handed >= 0.999999 * self._bar.total:
            self.close()

    def _show(self, part: _Part, bar: tqdm) -> None:
        self._strict += part.strict
        bar.set_description_str(part.next, refresh=False)
        bar.set_postfix_str(self._speed(bar.format_dict["elapsed"]), refresh=False)
        bar.update(part.operations)

    def _speed(self, seconds: float) -> str:
        rate = self._strict / max(seconds, 1e-9)
        mfu = "" if self._peak is None else f", strict MFU {rate / self._peak:.3f}"
        speed = f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e11 else f"{rate / 1e9:.1f} GFLOP/s"
        return f"{speed}{mfu}"

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
