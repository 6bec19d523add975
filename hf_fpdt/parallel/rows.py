"""The rows of a batch as one packed row: what its documents are, and its padding left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..labels import check_padding
from ..layout import Documents
from .documents import MARKS, breaks_of, marked_documents, positions_of, text_positions


@dataclass(frozen=True)
class Rows:
    """Rows of a batch put one after another, their padding left out: one packed row.

    Attributes:
        kept: of the batch's tokens [B·S] those that are in the row, [T].
        shape: (B, S).
        documents: of the packed row.
        marked: those of them that the batch marks itself, as if its rows went on as one another.
    """

    kept: Tensor
    shape: tuple[int, int]
    documents: Documents
    marked: Documents

    @classmethod
    def of(cls, lengths: list[int], n_tokens: int, device: torch.device, breaks: tuple[int, ...] = ()) -> Rows:
        """Of rows of so many tokens each, padded on the right to `n_tokens`.

        Args:
            breaks: where documents begin within rows, counted over all of them; of rows without padding.
        """
        places = torch.arange(n_tokens, device=device)
        kept = (places < torch.tensor(lengths, device=device)[:, None]).view(-1).nonzero().view(-1)
        firsts = accumulate(lengths[:-1], initial=0)
        documents, marked = (Documents(tuple(sorted({*each, *breaks})), len(kept)) for each in (firsts, (0,)))
        return cls(kept, (len(lengths), n_tokens), documents, marked)

    def flat(self, value: Tensor) -> Tensor:
        """[B, S, …] as [1, T, …]."""
        return value.flatten(0, 1)[self.kept.to(value.device)][None]

    def packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the packed row: what goes by tokens, and where its documents begin; a mask is left out."""
        by_token = {name: self.flat(value) for name, value in batch.items() if _shape(value)[:2] == self.shape}
        edges = torch.tensor([*self.documents.starts, self.documents.n_tokens], dtype=torch.int32)
        packed = {**batch, **by_token, "cu_seq_lens_q": edges.to(self.kept.device)}
        packed.pop("attention_mask", None)
        return packed

    def padded(self, value_1T: Tensor) -> Tensor:
        """[1, T, …] as [B, S, …], zeros where there is padding; differentiable."""
        whole = value_1T.new_zeros(self.shape[0] * self.shape[1], *value_1T.shape[2:])
        return whole.index_copy(0, self.kept.to(value_1T.device), value_1T[0]).unflatten(0, self.shape)

    def padded_each(self, value: Any) -> Any:
        """The same of every tensor of the packed row in tuples of them; what is none stays as it is."""
        if isinstance(value, tuple):
            return tuple(map(self.padded_each, value))
        packed = isinstance(value, Tensor) and value.shape[:2] == (1, self.documents.n_tokens)
        return self.padded(value) if packed else value


@dataclass(frozen=True)
class JoinedRows:
    """Collates rows of several lengths as one packed row, so that no padding is computed.

    For `ShardingCollator`, which cuts the row over ranks. A batch without padding stays as it is, and so does one with
    marks, positions or `shift_labels` of its own (a row's last one would be taken for the next row's first token), or
    with something that goes by rows and not by tokens.

    Attributes:
        inner: makes a batch with `input_ids` [B, S] and `attention_mask` [B, S] that marks padding on the right.
    """

    inner: Callable[[Any], Any]

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = dict(self.inner(features))
        lengths = _lengths_of_padded(batch)
        if lengths is None:
            return batch
        ids, labels = batch["input_ids"], batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            check_padding("JoinedRows", batch["attention_mask"] == 0, labels)
        return Rows.of(lengths, ids.shape[1], ids.device).packed(batch)


def _lengths_of_padded(batch: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each row of a batch that may become one packed row; None of another batch."""
    mask, shape = batch.get("attention_mask"), _shape(batch.get("input_ids"))
    if not isinstance(mask, Tensor) or len(shape) != 2 or shape[0] < 2 or mask.shape != shape:
        return None
    if any(batch.get(name) is not None for name in (*MARKS, "position_ids", "shift_labels")):
        return None
    by_rows = (_shape(value) for value in batch.values())
    if any(each[:1] == shape[:1] and each[:2] != shape for each in by_rows):
        return None
    return lengths_under(mask)


def lengths_under(mask_BS: Tensor) -> list[int] | None:
    """Tokens of each row; None where there is no padding, or some that is not on the right of a token."""
    on_the_right = (mask_BS[:, 1:] <= mask_BS[:, :-1]).all() & mask_BS[:, 0].all()
    *lengths, right = torch.cat([(mask_BS != 0).sum(1), on_the_right[None]]).tolist()  # the host waits once
    return lengths if right and min(lengths) < mask_BS.shape[1] else None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


class Packing(NamedTuple):
    """How a model runs on a batch.

    Attributes:
        documents: of its one row; None: each row is one document.
        rows: how the batch's rows were put into one; None: they were not.
    """

    documents: Documents | None = None
    rows: Rows | None = None


def batch_shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows of a model's arguments, and tokens of each; () where it is given neither ids nor embeddings."""
    tokens = _tokens(arguments)
    return () if tokens is None else tuple(tokens.shape[:2])


def _tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    return tokens if isinstance(tokens, Tensor) and tokens.dim() > 1 else None


_given: ContextVar[Mapping[str, Any]] = ContextVar("fpdt_marks", default=MappingProxyType({}))


@contextmanager
def marks_of(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside, what these arguments of a whole model mark counts, though that may keep it from its base model."""
    found = {name: arguments[name] for name in (*MARKS, "position_ids") if arguments.get(name) is not None}
    token = _given.set(found)
    try:
        yield
    finally:
        _given.reset(token)


def pack_arguments(arguments: dict[str, Any], *, ranks: int, may_join: bool, takes_positions: bool = True) -> Packing:
    """What documents a base model's arguments are of; rows of several lengths, or documents, become one packed row.

    `arguments` are changed: boundaries are taken out, positions restart, and with `rows` there is no mask any more.

    Args:
        ranks: that share the row; each has its part of tokens and positions, and the boundaries of all.
        may_join: whether the model takes token ids or embeddings and positions, and nothing else that goes by rows.
        takes_positions: whether it has positions.

    Raises:
        ValueError: boundaries disagree.
        NotImplementedError: there are documents where they cannot be told apart.
    """
    takes_positions = takes_positions or "position_ids" in arguments
    arguments |= {name: value for name, value in _given.get().items() if arguments.get(name) is None}
    try:
        return _pack(arguments, ranks=ranks, may_join=may_join)
    finally:
        if not takes_positions and ranks == 1:
            arguments.pop("position_ids", None)


def _pack(arguments: dict[str, Any], *, ranks: int, may_join: bool) -> Packing:
    tokens = _tokens(arguments)
    marks = {name: value for name in MARKS if (value := arguments.pop(name, None)) is not None}
    if tokens is None:
        return Packing()
    batch, length = tokens.shape[:2]
    if ranks > 1:
        return Packing(marked_documents(marks, length * ranks) if marks else None)
    mask = arguments.get("attention_mask")
    if mask is not None:
        return _pack_masked(arguments, marks, may_join=may_join)
    if batch > 1:
        return _pack_several(arguments, marks, may_join=may_join)
    positions = arguments.get("position_ids")
    documents = marked_documents({**marks, "position_ids": positions}, length)
    if documents is not None and positions is None:
        arguments["position_ids"] = positions_of(documents, tokens.device)[None]
    return Packing(documents)


def _pack_masked(arguments: dict[str, Any], marks: dict[str, Any], *, may_join: bool) -> Packing:
    """Under a mask transformers sees no documents; padding on the right is left out of what is computed."""
    mask = arguments["attention_mask"]
    positions = text_positions(arguments.get("position_ids"))
    plain = isinstance(mask, Tensor)  # a model may be given one for each kind of its layers
    restarts = torch.is_grad_enabled() and positions is not None and plain and _restarts(positions, mask)
    if marks or restarts:
        what = ", ".join(marks) if marks else "position_ids that restart"
        raise NotImplementedError(
            f"hf_fpdt: attention_mask beside {what}: under a mask transformers takes a row for one document; leave "
            "attention_mask out of packed rows."
        )
    if not may_join or not plain or mask.dim() != 2 or mask.shape[1] < 2:
        return Packing()
    lengths = lengths_under(mask)
    if lengths is None:
        return Packing()
    rows = Rows.of(lengths, mask.shape[1], mask.device)
    _join(arguments, rows)
    return Packing(rows.documents if len(rows.documents.starts) > 1 else None, rows)


def _pack_several(arguments: dict[str, Any], marks: dict[str, Any], *, may_join: bool) -> Packing:
    """Several rows, each of one document or more."""
    positions = text_positions(arguments.get("position_ids"))
    if lengths := [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if name in marks]:
        raise NotImplementedError(
            f"hf_fpdt: {lengths[0]} marks documents of one row, and the batch has several: put its documents in one "
            "row, or mark them by seq_idx or position_ids."
        )
    ids = marks.get("seq_idx")
    changes = None if positions is None else breaks_of(positions)
    if ids is not None:
        by_ids = ids[:, 1:] != ids[:, :-1]
        if changes is not None and not torch.equal(by_ids.expand_as(changes), changes):
            raise ValueError("hf_fpdt: seq_idx and position_ids disagree about where documents begin; give one.")
        changes = by_ids
    tokens = _tokens(arguments)
    if changes is None or tokens is None or tokens.shape[1] < 2:
        return Packing()
    batch, length = tokens.shape[:2]
    places = changes.expand(batch, -1).nonzero().tolist()
    if not places:
        return Packing()
    if not may_join:
        raise NotImplementedError(
            "hf_fpdt: packed documents in a batch of several rows are not supported for this model; give one row."
        )
    rows = Rows.of([length] * batch, length, tokens.device, tuple(row * length + at + 1 for row, at in places))
    _join(arguments, rows)
    return Packing(rows.documents, rows)


def _restarts(positions: Tensor, mask: Tensor) -> bool:
    """Whether the position of a real token is not larger than that of the one before; gaps are not restarts."""
    real = (mask[:, 1:] * mask[:, :-1]).bool() if mask.dim() == 2 and mask.shape[1] == positions.shape[1] else True
    return bool(((positions[:, 1:] <= positions[:, :-1]) & real).any())


def _join(arguments: dict[str, Any], rows: Rows) -> None:
    """Make one row of the arguments."""
    arguments.pop("attention_mask", None)
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = torch.arange(rows.shape[1], device=rows.kept.device).expand(rows.shape)
    elif arguments["position_ids"].shape[0] == 1:
        arguments["position_ids"] = arguments["position_ids"].expand(rows.shape)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.shape[:2] == rows.shape:
            arguments[name] = rows.flat(value)
