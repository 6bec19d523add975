"""Documents of which a plan's rows are made: drawn from a distribution, or as they were counted."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from ..layout import Documents


@dataclass(frozen=True)
class Corpus:
    """Lengths of documents.

    Attributes:
        lengths: of documents that were counted; (): they are drawn.
        mean, sigma: of a lognormal distribution of tokens, sigma that of their logarithm.

    Raises:
        ValueError: there is none, a length is not positive, or sigma is no number from 0.
    """

    lengths: tuple[int, ...] = ()
    mean: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:  # NaN neither
            raise ValueError(f"Corpus: a sigma from 0 is expected, not {self.sigma}.")
        wrong = [length for length in self.lengths if length < 1]
        if wrong or (not self.lengths and self.mean < 1):
            raise ValueError(
                f"Corpus: documents of one token or more are expected, not {wrong[0] if wrong else self.mean}."
            )

    def row(self, n_tokens: int) -> Documents:
        """A packed row: documents drawn one after another, the same for each call; the last is cut where it ends."""
        return _row(self, n_tokens)

    def _draw(self, draws: random.Random) -> int:
        if self.lengths:
            return draws.choice(self.lengths)
        return max(1, round(draws.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)))


@lru_cache(maxsize=64)
def _row(corpus: Corpus, n_tokens: int) -> Documents:
    draws, starts, at = random.Random(0), [0], 0
    while at < n_tokens:
        at += min(corpus._draw(draws), n_tokens)
        starts.append(at)
    return Documents(tuple(start for start in starts if start < n_tokens), n_tokens)
