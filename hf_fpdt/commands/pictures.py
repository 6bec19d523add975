"""What every picture needs: matplotlib, or one line that says it is missing."""

from __future__ import annotations

import importlib.util


class PictureError(RuntimeError):
    """The picture cannot be drawn on this machine."""


def check_matplotlib() -> None:
    """Raise PictureError, which says what to install, unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError("the picture is drawn by matplotlib, which is not installed: pip install matplotlib.")
