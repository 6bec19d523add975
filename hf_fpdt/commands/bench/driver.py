"""The order of a benchmark's jobs, the search for the longest length, and the rows they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...forecast import peak_of
from .children import OVER_THE_LIMIT
from .figures import Rates, Trained, keys_of
from .job import Job, Outcome
from .report import OK, Row

Run = Callable[[Job], Outcome]
# They cut nothing by --chunk-tokens.
PEERS = frozenset({"hf", "liger", "hf-offload", "alst", "ring", "alst-sp"})


class _TooSlow(Exception):
    """A step was ended by the limit."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is to be measured.

    Attributes:
        job: what all jobs have in common; its `tokens` are the lengths, or where the search for the longest begins.
        stacks: names.
        trained: the model, for figures.
        name: the model, for people.
        longest: look for the longest length of each stack in place of measuring the given ones.
        run: does a job in a process of its own.
        say: tells people what goes on.
    """

    job: Job
    stacks: tuple[str, ...]
    trained: Trained
    name: str
    longest: bool
    run: Run
    say: Callable[[str], None]

    def rows(self) -> Iterator[Row]:
        """One for each (stack, length), or for each stack the longest; whatever happens to a child is a row."""
        ceiling: dict[str, Any] | None = None
        for stack in self.stacks:
            self.say(f"{stack}: comparing loss and gradients with plain Hugging Face …")
            parity = self.run(replace(self.job, kind="parity", stack=stack, tokens=()))
            reason = parity.reason or ("" if parity.found["passed"] else parity.found["verdict"])
            if reason:
                lengths = (0,) if self.longest else self.job.tokens
                yield from (self._row(stack, n_tokens, parity, reason) for n_tokens in lengths)
                continue
            self.say(f"{stack}: {parity.found['verdict']}")
            if ceiling is None:
                ceiling = self._ceiling()
            found = {"parity": parity.found["parity"]}
            if self.longest:
                yield self._longest(stack, found, ceiling)
            else:
                yield from (self._measured(stack, n_tokens, found, ceiling) for n_tokens in self.job.tokens)

    def _ceiling(self) -> dict[str, Any]:
        """Rates, or nothing where they cannot be measured; a missing ceiling loses no row."""
        self.say("measuring the rates of the attention kernel and of matrix products …")
        # The longest length is not known yet; beyond 128K keys the rate stays.
        tokens = (*self.job.tokens, 2**20) if self.longest and self.job.device == "cuda" else self.job.tokens
        outcome = self.run(replace(self.job, kind="ceiling", stack="", tokens=tokens))
        if outcome.reason:
            self.say(f"no ceiling: {outcome.reason}")
        return outcome.found

    def _measured(self, stack: str, n_tokens: int, found: dict[str, Any], ceiling: dict[str, Any]) -> Row:
        self.say(f"{stack}: {n_tokens:,} tokens …")
        outcome = self.run(replace(self.job, kind="step", stack=stack, tokens=(n_tokens,)))
        if outcome.reason:
            self.say(f"{stack}: {n_tokens:,} tokens: {outcome.reason}")
            return self._row(stack, n_tokens, outcome, outcome.reason)
        peak, rates = peak_of(outcome.found["gpu"]), _rates(ceiling, n_tokens)
        figures = self.trained.figures(n_tokens, outcome.found["step_s"], peak, rates, gpus=self.job.gpus)
        self.say(f"{stack}: {n_tokens:,} tokens: {outcome.found['step_s']:.2f} s")
        return {**self._row(stack, n_tokens, outcome, OK), **found, **figures, **_columns(rates), "peak": peak}

    def _longest(self, stack: str, found: dict[str, Any], ceiling: dict[str, Any]) -> Row:
        """The row of the longest length that completes a step; where none does, of the shortest that was tried.

        What takes too long may fit or not, so the search ends there.
        """
        tried: dict[int, Row] = {}

        def fits(n_tokens: int) -> bool:
            tried[n_tokens] = self._measured(stack, n_tokens, found, ceiling)
            if tried[n_tokens]["result"].startswith(OVER_THE_LIMIT):
                raise _TooSlow
            return bool(tried[n_tokens]["result"] == OK)

        try:
            longest = find_longest(fits, *self.job.tokens)
        except _TooSlow:
            longest = max((n for n, row in tried.items() if row["result"] == OK), default=0)
        failed = {n: row for n, row in tried.items() if n > longest}
        if not longest:
            return failed[min(failed)]
        above = f"{min(failed):,} tokens: {failed[min(failed)]['result']}" if failed else "any more: not tried"
        return {**tried[longest], "next": above}

    def _row(self, stack: str, n_tokens: int, outcome: Outcome, result: str) -> dict[str, Any]:
        job = self.job
        return {
            "stack": stack,
            "tokens": n_tokens,
            "result": result,
            "model": self.name,
            "layers": self.trained.sizes.layers,
            "trained": "every weight, AdamW" if job.full else "LoRA r=16, AdamW",
            "dtype": job.dtype,
            "gpus": job.gpus,
            "held_gib": job.held_gib or None,
            "documents": job.documents,
            "chunk_tokens": job.chunk_tokens if stack not in PEERS else None,
            **{key: value for key, value in outcome.found.items() if key not in ("passed", "verdict")},
        }


def _rates(ceiling: dict[str, Any], n_tokens: int) -> Rates | None:
    """Those measured at the nearest number of keys that is not below."""
    measured = {int(keys): rates for keys, rates in ceiling.get("attention", {}).items()}
    if not measured:
        return None
    keys = min((k for k in measured if k >= keys_of(n_tokens)), default=max(measured))
    forward, backward = measured[keys]
    return Rates(forward=forward, backward=backward, matmul=ceiling["matmul"], kernel=ceiling["kernel"])


def _columns(rates: Rates | None) -> dict[str, Any]:
    if rates is None:
        return {}
    return {
        "kernel": rates.kernel,
        "attention_forward": rates.forward,
        "attention_backward": rates.backward,
        "matmul": rates.matmul,
    }


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
