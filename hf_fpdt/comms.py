"""Ulysses: exchange of sequence pieces for heads inside a sequence-parallel group (paper sections 2 and 4.1).

A group of one rank holds all heads of the whole sequence already; both exchanges then hand their input back. Groups of
more ranks are refused in this version.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SequenceParallelGroup:
    """The ranks that share one sequence.

    Raises:
        NotImplementedError: `size` is not 1.
    """

    size: int = 1

    def __post_init__(self) -> None:
        if self.size != 1:
            raise NotImplementedError(
                f"sp_size={self.size}: this version trains each sequence on one process; set sp_size=1."
            )

    def seq_to_heads(self, x_BSNH: Tensor) -> Tensor:
        """A rank's piece of a chunk for all heads → the whole chunk for the rank's share of the heads."""
        return x_BSNH

    def heads_to_seq(self, x_BSNH: Tensor) -> Tensor:
        """The inverse of `seq_to_heads`."""
        return x_BSNH
