"""The longest length that completes a step: doubled until one does not, then halved in between. No torch."""

from __future__ import annotations

from collections.abc import Callable

UNIT = 1024
MOST_TOKENS = 2**27


def unit_of(n_tokens: int) -> int:
    """Lengths near this one are told apart by so many tokens: 1K up to 64K, 2K up to 128K, 4K up to 256K, …"""
    return max(UNIT, 2 ** (n_tokens.bit_length() - 1) // 32)


def find_longest(fits: Callable[[int], bool], *starts: int) -> int:
    """The longest length for which `fits` holds, to within `unit_of` it; 0 where not even 1K fits.

    Args:
        fits: runs a length; what is longer than a length that does not fit is taken not to fit either.
        starts: lengths to begin with, a guess from below and one from above, say; doubled where all of them fit.
    """
    rising = iter(sorted({max(UNIT, start // UNIT * UNIT) for start in starts}))
    low, high = 0, next(rising)
    while high <= MOST_TOKENS and fits(high):
        low, high = high, next(rising, 2 * high)
    while low == 0 and high > UNIT:
        half = max(UNIT, high // 2 // UNIT * UNIT)
        low, high = (half, high) if fits(half) else (0, half)
    while low and high - low > unit_of(low):
        unit = unit_of(low)
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
