"""Bytes an optimizer takes for each weight that trains."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Of a kind of optimizer: numbers that it keeps for every weight, and the bytes of one; None: a weight's.
OPTIMIZERS: Mapping[str, tuple[int, int | None]] = MappingProxyType(
    {
        "adamw": (2, None),
        "adamw-8bit": (2, 1),
        "lion": (1, None),
        "adafactor": (0, None),  # a row and a column for a matrix
        "sgd-momentum": (1, None),
        "sgd": (0, None),
    }
)


def state_bytes(kind: str, weights: int, weight_bytes: int) -> int:
    """Bytes of what an optimizer keeps beside so many weights and their gradients.

    Args:
        kind: of `OPTIMIZERS`.
        weights: numbers that train.
        weight_bytes: bytes of one.
    """
    count, element_bytes = OPTIMIZERS[kind]
    return count * weights * (element_bytes or weight_bytes)


def sum_bytes(largest_trained: int) -> int:
    """Bytes of gradients that are added up over chunks: the sums in fp32, and what they are cast to at the end.

    Args:
        largest_trained: the most that train in one layer, or outside of the layers.
    """
    return (4 + 2) * largest_trained
