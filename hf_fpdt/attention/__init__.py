"""Attention kernels, one file each, and the online softmax that merges their pieces.

In reading order:

    spec       what a call asks of attention
    online     one query row over a stream of K, V spans, merged
    rows       the calls that a row is made of: documents, blocks, spans
    sinks      a key without a value in each head's softmax
    kernels    the contract of a kernel, one file each, and the table
    reference  slow twins, for checks
"""

from .kernels.contract import Kernel
from .kernels.math import SCORE_BYTES
from .kernels.table import KERNELS, select_kernel, why_not_served
from .online import backward_row, call_backward, call_forward, forward_row
from .reference import attention, peaked_qkv
from .rows import row_calls
from .sinks import sinks_gradient
from .spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "KERNELS",
    "Kernel",
    "SCORE_BYTES",
    "attention",
    "backward_row",
    "call_backward",
    "call_forward",
    "forward_row",
    "peaked_qkv",
    "row_calls",
    "select_kernel",
    "sinks_gradient",
    "why_not_served",
]
