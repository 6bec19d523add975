"""Attention kernels, one file each, and the online softmax that merges their pieces.

In reading order:

    online             online attention: one query row against a stream of K, V spans
    kernels            one file a kernel, their contract and their table
    reference          slow and obvious twins of the fast paths, in the dtype they are given. For tests and checks
"""

from .kernels.contract import Kernel
from .kernels.table import KERNELS, select_kernel
from .online import backward_row, forward_row, kernel_spans
from .reference import attention, peaked_qkv

__all__ = [
    "KERNELS",
    "Kernel",
    "attention",
    "backward_row",
    "forward_row",
    "kernel_spans",
    "peaked_qkv",
    "select_kernel",
]
