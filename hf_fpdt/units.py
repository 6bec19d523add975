"""Units and pages of memory."""

from __future__ import annotations

GIB = 2**30
PAGE = 4096


def page_rounded(nbytes: int) -> int:
    """The next multiple of a page: what pinning and direct I/O want, and less than 0.1 % of any real entry."""
    return -(-nbytes // PAGE) * PAGE
