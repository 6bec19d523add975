"""What one child process is asked to do, as it travels to it, and what comes back. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["parity", "step", "ceiling"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One child's work.

    Attributes:
        kind: compare a stack with plain Hugging Face, measure its steps, or measure what the machine can do at most.
        stack: name in the catalogue, or `module:Class`.
        model: hub name or folder whose configuration is taken; None: `shape`.
        shape: name of a known model's sizes.
        layers: of the model to keep; None: its own.
        full: train every weight, not adapters alone.
        tokens: length of the sequence; of a ceiling, every length asked for.
        steps: to measure, after a short one that compiles kernels.
        chunk_tokens: of FPDT; None: its own choice.
        device: "cuda" or "cpu".
        dtype: of every parameter, "bfloat16" or "float32".
        gpus: that train the model together, a process each.
        held_gib: memory of each GPU that steps do without.
        quantised: how the linears under adapters are held, "nf4" or "int8"; None: in `dtype`.
        documents: what rows are packed of, as --documents has it; None: a row is one document.
    """

    kind: Kind
    stack: str
    model: str | None
    shape: str
    layers: int | None
    full: bool
    tokens: tuple[int, ...]
    steps: int
    chunk_tokens: int | None
    device: str
    dtype: str
    gpus: int = 1
    held_gib: float = 0.0
    quantised: str | None = None
    documents: str | None = None

    @property
    def n_tokens(self) -> int:
        """The one length."""
        (length,) = self.tokens
        return length

    def write(self, path: Path) -> None:
        """As JSON, for the child."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "tokens": tuple(fields["tokens"])})


@dataclass(frozen=True)
class Outcome:
    """What a child came to.

    Attributes:
        found: conditions, and the numbers it found.
        reason: why there are no numbers, in words; empty where there are.
    """

    found: dict[str, Any]
    reason: str = ""
