"""The loss of a chunk with its gradient: `step` chooses, `kernel` is the same in one kernel of Triton."""

from .step import cross_entropy

__all__ = ["cross_entropy"]
