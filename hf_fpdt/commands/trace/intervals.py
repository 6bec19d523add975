"""Intervals of time as pairs (start, end): union, difference, length. Results are disjoint and in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union: what overlaps or touches becomes one."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        elif end > start:
            union.append((start, end))
    return union


def clipped(intervals: Iterable[Interval], window: Interval) -> Iterator[Interval]:
    """The parts inside the window, each on its own."""
    for start, end in intervals:
        start, end = max(start, window[0]), min(end, window[1])
        if end > start:
            yield start, end


def complement(union: Sequence[Interval], window: Interval) -> list[Interval]:
    """What of the window lies outside the union."""
    starts = [window[0], *(end for _, end in union)]
    ends = [*(start for start, _ in union), window[1]]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]


def outside(union: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What of the first union lies outside the second."""
    if not union:
        return []
    free = complement(list(clipped(other, (union[0][0], union[-1][1]))), (union[0][0], union[-1][1]))
    return _common(union, free)


def _common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > start:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(intervals: Iterable[Interval]) -> float:
    """The sum of lengths."""
    return sum(end - start for start, end in intervals)
