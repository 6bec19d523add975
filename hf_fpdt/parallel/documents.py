"""Which tokens of a batch are one document: read off what packs them, and told to the layers of the pass.

Boundaries come from `cu_seq_lens_q`, else from `seq_idx`, else from `position_ids` that do not go on by one, which is
what transformers' and TRL's collators make of packed rows. Where two of them disagree it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..layout import Documents

# What transformers' collators call boundaries, and hand through a model to its layers.
MARKS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

_documents: ContextVar[Documents | None] = ContextVar("fpdt_documents", default=None)


def documents_of_batch() -> Documents | None:
    """The documents of the row that the model runs on; None: it is one."""
    return _documents.get()


@contextmanager
def batch_of(documents: Documents | None) -> Iterator[None]:
    """Say so for the calls inside."""
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)


def marked_documents(batch: Mapping[str, Any], n_tokens: int) -> Documents | None:
    """The documents of one row by `cu_seq_lens_q`, `seq_idx` or positions; None of a row that is one document.

    Args:
        batch: of `cu_seq_lens_q`, `cu_seq_lens_k` [documents + 1], `seq_idx` [1, T] and `position_ids` [1, T] what
            there is; positions of several axes count by the first of four, that of the text.
        n_tokens: of the row.

    Raises:
        ValueError: they disagree, or are no boundaries of this row.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if batch.get(name) is not None:
            found[name] = _starts_of_edges(name, batch[name], n_tokens)
    if batch.get("seq_idx") is not None:
        ids = batch["seq_idx"].reshape(-1)
        _check_length("seq_idx", ids, n_tokens)
        found["seq_idx"] = _starts_where(ids[1:] != ids[:-1])
    positions = text_positions(batch.get("position_ids"))
    if positions is not None:
        positions = positions.reshape(-1)
        _check_length("position_ids", positions, n_tokens)
        found["position_ids"] = _starts_where(breaks_of(positions))
    first = next(iter(found.values()), (0,))
    if any(starts != first for starts in found.values()):
        counted = ", ".join(f"{name} {len(starts)}" for name, starts in found.items())
        raise ValueError(
            f"hf_fpdt: what marks the documents of a packed row disagrees (documents by {counted}): a document begins "
            "where cu_seq_lens says so, where seq_idx changes and where position_ids do not go on by one; make them "
            "agree, or give one of them."
        )
    return None if len(first) == 1 else Documents(first, n_tokens)


def text_positions(positions: Tensor | None) -> Tensor | None:
    """[1 or B, T] of a text's tokens; None where there are none, or of images alone."""
    if positions is None or positions.dim() < 3:
        return positions
    return positions[0] if positions.shape[0] == 4 else None


def positions_of(documents: Documents, device: torch.device | None = None) -> Tensor:
    """That begin with 0 in each document, [T]."""
    return _places(torch.arange(documents.n_tokens, device=device), documents)


def _places(tokens: Tensor, documents: Documents) -> Tensor:
    """Of tokens of the row, where they stand in their documents."""
    starts = torch.tensor(documents.starts, device=tokens.device)
    return tokens - starts[torch.bucketize(tokens, starts, right=True) - 1]


def own_positions(own: Tensor, documents: Documents | None) -> Tensor:
    """Positions of some tokens of a sequence by their global indices, as a packed row or as one document."""
    return own if documents is None else _places(own, documents)


def without_ends(labels_BS: Tensor, documents: Documents, ignore_index: int) -> Tensor:
    """Labels of next tokens of one row, none of which is that of the next document's first token."""
    ends = torch.tensor([start - 1 for start in documents.starts[1:]], dtype=torch.long, device=labels_BS.device)
    return labels_BS.index_fill(1, ends, ignore_index)


def ignore_first_tokens(batch: Mapping[str, Any], ignore_index: int) -> None:
    """Labels of documents' first tokens, which nothing predicts, count for nothing from now on.

    On the device alone: the host does not wait.

    Args:
        batch: with `labels` [1, T], and `cu_seq_lens_q`, `seq_idx` or `position_ids`; of another nothing happens, nor
            of a rank's part, whose labels are those of next tokens already.
    """
    labels, positions = batch.get("labels"), text_positions(batch.get("position_ids"))
    others = any(batch.get(name) is not None for name in ("attention_mask", "shift_labels"))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or others:
        return
    edges, ids = batch.get("cu_seq_lens_q"), batch.get("seq_idx")
    if edges is not None and len(labels) == 1:
        labels[:, edges[:-1].long().clamp(max=labels.shape[1] - 1)] = ignore_index
    elif ids is not None and ids.shape == labels.shape:
        labels[:, 1:].masked_fill_(ids[:, 1:] != ids[:, :-1], ignore_index)
    elif positions is not None and positions.shape == labels.shape:
        labels[:, 1:].masked_fill_(breaks_of(positions), ignore_index)


def breaks_of(positions: Tensor) -> Tensor:
    """Where positions [..., T] do not go on by one, [..., T - 1]."""
    return positions[..., 1:] != positions[..., :-1] + 1


def _starts_where(breaks: Tensor) -> tuple[int, ...]:
    return (0, *(breaks.nonzero().view(-1) + 1).tolist())


def _starts_of_edges(name: str, edges: Tensor, n_tokens: int) -> tuple[int, ...]:
    values = edges.reshape(-1).tolist()
    ascends = all(left <= right for left, right in zip(values[:-1], values[1:], strict=True))
    if len(values) < 2 or values[0] != 0 or values[-1] != n_tokens or not ascends:
        raise ValueError(
            f"hf_fpdt: {name} is expected to ascend from 0 to the row's {n_tokens:,} tokens; it has {len(values)} "
            f"numbers from {values[:1]} to {values[-1:]}."
        )
    return tuple(sorted(set(values[:-1]) - {n_tokens}))


def _check_length(name: str, marks: Tensor, n_tokens: int) -> None:
    if len(marks) != n_tokens:
        raise ValueError(
            f"hf_fpdt: {name} marks {len(marks):,} tokens, and the row has {n_tokens:,}; one for each is expected."
        )
