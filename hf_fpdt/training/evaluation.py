"""Evaluation that gives one process's loss on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers.trainer_pt_utils import find_batch_size, nested_truncate

from ..labels import IGNORE_INDEX


@dataclass
class Evaluation:
    """One run over an evaluation set.

    Attributes:
        rows: samples of the set; None where it has no length (then every row counts).
        rank: this process's data-parallel place, of `ranks`.
        finite_only: whether batches whose loss is not finite are left out.
        samples: of the set, without filling; None where that is not known.
        batch_size: samples that a batch is made of, which may be fewer rows: a collator may pack them.
    """

    rows: int | None
    rank: int
    ranks: int
    finite_only: bool
    samples: int | None = None
    batch_size: int = 1
    steps: int = 0
    sums: Tensor | None = None  # of losses and of rows

    def next_rows(self, inputs: Any) -> int:
        """Rows of this rank's next batch that are no filling; the labels of filling are switched off."""
        batch = find_batch_size(inputs) or len(inputs)  # of samples that are not collated: their number
        # Rows are samples only where that many were filled up: the last batch of DPO, whose pairs are two rows each,
        # may have as many rows as a whole batch has samples.
        if self.samples is not None and (self.rows is None or batch != self.batch_size):
            return self._next_samples(batch)
        first = (self.steps * self.ranks + self.rank) * batch
        self.steps += 1
        real = batch if self.rows is None else min(max(self.rows - first, 0), batch)
        if real == batch:
            return real
        names = ("labels", "shift_labels") if isinstance(inputs, Mapping) else ()
        labels = [name for name in names if inputs.get(name) is not None]
        if not labels:
            raise NotImplementedError(
                f"hf_fpdt: {self.rows} rows do not divide into whole batches on {self.ranks} ranks, and what fills "
                "them up cannot be left out of a loss without labels: evaluate on a multiple of ranks times batch "
                "size."
            )
        for name in labels:
            inputs[name] = inputs[name].clone()
            inputs[name][real:] = IGNORE_INDEX
        return real

    def _next_samples(self, rows: int) -> int:
        """Samples of a batch that has other rows than samples: of the last one, or packed by the collator."""
        assert self.samples is not None
        first = (self.steps * self.ranks + self.rank) * self.batch_size
        self.steps += 1
        real = min(max(self.samples - first, 0), self.batch_size)
        if self.rows is not None and real < self.batch_size:
            raise NotImplementedError(
                f"hf_fpdt: {self.samples} samples do not divide into whole batches of {self.batch_size} on "
                f"{self.ranks} ranks, and a batch that the collator packs into {rows} row(s) does not tell what fills "
                "them up: evaluate on a multiple of ranks times batch size, or with a batch size of 1."
            )
        return real

    def add(self, loss: Tensor, rows: int) -> None:
        """Count a batch's loss once for each of its rows (a batch of filling alone has a loss of NaN)."""
        if not rows:
            return
        counts = torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float)]) * rows
        if self.finite_only:
            counts = counts.where(loss.isfinite(), 0.0)
        self.sums = counts if self.sums is None else self.sums + counts

    def loss(self, accelerator: Any) -> float | None:
        """Mean over the samples of all ranks; None where no loss was computed."""
        sums = torch.zeros(2, device=accelerator.device) if self.sums is None else self.sums
        total, rows = accelerator.reduce(sums, "sum").tolist()
        return total / rows if rows else None


def first_rows(arrays: Any, rows: int, concatenated: bool) -> Any:
    """Arrays that Trainer gathered (a list by batch, or one), without the filling at the end."""
    if arrays is None:
        return None
    if concatenated:
        return nested_truncate(arrays, rows)
    kept = []
    for batch in arrays:
        kept.append(nested_truncate(batch, max(rows, 0)))
        rows -= find_batch_size(batch) or 0
    return kept


def filled(dataset: Any, rows: int, multiple: int) -> Any:
    """The set with its first sample repeated at the end until the rows are a multiple."""
    missing = -rows % multiple
    if not missing:
        return dataset
    indices = [*range(rows), *[0] * missing]
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
