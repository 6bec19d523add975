"""The cut of a batch over the ranks of a group: who makes it, and how a rank's part is known again.

`ShardingCollator` cuts, `check_shard` looks before the model runs: both ends of one contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..labels import IGNORE_INDEX, check_padding, shifted
from ..layout import ChunkPlan, Documents
from .documents import MARKS, marked_documents, own_positions, positions_of, without_ends
from .group import SequenceParallelGroup

# What a sharded batch calls the number that tells whole samples apart, and which of its tokens are padding.
SAMPLE_KEY, PADDING_KEY = "fpdt_sample", "fpdt_padding"

_ranks_of_batch: ContextVar[int] = ContextVar("fpdt_ranks_of_batch", default=1)


def ranks_of_batch() -> int:
    """How many ranks share the sequence the model runs on; above 1 this rank's position_ids have gaps."""
    return _ranks_of_batch.get()


@contextmanager
def batch_shared_by(ranks: int) -> Iterator[None]:
    """Say so for the calls inside."""
    token = _ranks_of_batch.set(ranks)
    try:
        yield
    finally:
        _ranks_of_batch.reset(token)


def own_tokens(plan: ChunkPlan, rank: int, device: torch.device | None = None) -> Tensor:
    """Global indices of the tokens that `rank` owns, [n_tokens / sp_size], in its local order."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in plan.rank_pieces(rank)])


@dataclass(frozen=True)
class ShardingCollator:
    """Collates features and keeps this rank's tokens.

    Attributes:
        inner: makes a batch of whole sequences: a mapping with `input_ids` [B, S] and, to train, `labels` [B, S];
            other tensors [B, S, …] are cut with them, everything else passes. `attention_mask` may mark padding on
            the right, whose labels must be -100; it is left out of the result.
        sp_size: ranks that share a sequence.
        rank: this process's place among them.
        chunk_tokens: global tokens a chunk, as in `FPDTPlugin`.
        pad_token_id: what the sequence is filled up with.
        two_each: whether it is filled up so far that no chunk leaves each rank a single token, which recurrent layers
            take for one to be decoded.

    The result has `input_ids`, `position_ids` and, if there were labels, `shift_labels` (the next token at each
    position) and `labels` (the same, so that the model knows it is to compute a loss), all [B, S/P]. An inner
    collator's own `shift_labels` count, and `labels` beside them do not. `fpdt_sample` [B] is a number made of each
    whole row, by which the model sees that the ranks hold parts of the same samples; pass it on if you can. Where
    there is padding on any rank, `fpdt_padding` [B, S/P] is true of it: routers of experts do not count it.

    A row of packed documents (of the one row of a batch, marked as transformers' and TRL's collators do) keeps its
    boundaries: `position_ids` restart, `cu_seq_lens_q` [documents + 1] has those of the whole row on every rank, and
    no label at a document's end counts.

    Raises:
        ValueError: no `input_ids`, labels of another shape, padding that is not on the right or whose labels count, or
            boundaries that disagree.
        NotImplementedError: packed documents in several rows, or under an attention mask.
    """

    inner: Callable[[Any], Any]
    sp_size: int
    rank: int
    chunk_tokens: int
    pad_token_id: int = 0
    two_each: bool = False

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        return self.cut(dict(self.inner(features)))

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch of whole sequences, which is changed."""
        _check_batch(batch)
        documents = _take_documents(batch)
        labels = batch.get("labels") if batch.get("shift_labels") is None else batch["shift_labels"]
        mask = batch.pop("attention_mask", None)
        _check_padding(mask, labels)
        n_tokens = batch["input_ids"].shape[1]
        missing = self._missing(n_tokens)
        padding = _padding(mask, batch["input_ids"], missing)
        if batch.get("shift_labels") is None and batch.get("labels") is not None:
            batch["shift_labels"] = shifted(batch["labels"])
        if documents is not None and batch.get("shift_labels") is not None:
            batch["shift_labels"] = without_ends(batch["shift_labels"], documents, IGNORE_INDEX)
        if batch.get("shift_labels") is not None:
            batch["labels"] = batch["shift_labels"] = pad(batch["shift_labels"], (0, missing), value=IGNORE_INDEX)
        batch[SAMPLE_KEY] = _fingerprint(batch["input_ids"], batch.get("shift_labels"))
        batch = {name: self._fill(name, value, n_tokens, missing) for name, value in batch.items()}
        batch |= {} if padding is None else {PADDING_KEY: padding}
        device = batch["input_ids"].device
        positions = torch.arange(n_tokens + missing, device=device)
        if documents is not None:
            documents = documents.padded(n_tokens + missing)
            positions = positions_of(documents, device)
            edges = torch.tensor([*documents.starts, documents.n_tokens], dtype=torch.int32, device=device)
            batch["cu_seq_lens_q"] = edges
        batch["position_ids"] = positions.expand(batch["input_ids"].shape[0], -1)
        own = own_tokens(ChunkPlan(n_tokens + missing, self.chunk_tokens, self.sp_size), self.rank, device)
        return {
            name: value[:, own] if _by_token(value, n_tokens + missing) else value for name, value in batch.items()
        }

    def _missing(self, n_tokens: int) -> int:
        """Tokens to fill up with, so that ranks hold as many each."""
        missing = -n_tokens % self.sp_size
        single = self.two_each and (n_tokens + missing) % self.chunk_tokens == self.sp_size
        return missing + self.sp_size * single

    def _fill(self, name: str, value: Any, n_tokens: int, missing: int) -> Any:
        """Fill up on the right; labels are already."""
        if not missing or not _by_token(value, n_tokens) or name in ("labels", "shift_labels"):
            return value
        tail = (0, 0) * (value.dim() - 2)
        return pad(value, (*tail, 0, missing), value=self.pad_token_id if name == "input_ids" else 0)


def _padding(mask_BS: Tensor | None, ids_BS: Tensor, missing: int) -> Tensor | None:
    """Which tokens of the filled rows are padding, [B, S + missing]; None where there is none."""
    if not missing and (mask_BS is None or bool(mask_BS.all())):
        return None
    padding_BS = torch.zeros_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS == 0
    return pad(padding_BS, (0, missing), value=True)


def _fingerprint(ids_BS: Tensor, shift_labels_BS: Tensor | None) -> Tensor:
    """A number for each row that differs between samples, in all likelihood; below 2^40, so that sums stay exact."""
    weights = torch.arange(1, ids_BS.shape[1] + 1, device=ids_BS.device) * 2_654_435_761 % 1_048_573
    labels = 0 if shift_labels_BS is None else shift_labels_BS[:, : ids_BS.shape[1]]
    return ((ids_BS * 31 + labels) * weights).sum(1) % 2**40


def _by_token(value: Any, n_tokens: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == n_tokens


def _check_batch(batch: Mapping[str, Any]) -> None:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = "none" if ids is None else f"{type(ids).__name__} of shape {getattr(ids, 'shape', '?')}"
        raise ValueError(
            f"ShardingCollator: the inner collator must give input_ids of shape [batch, tokens]; got {got}."
        )
    for name in ("labels", "shift_labels"):
        labels = batch.get(name)
        if labels is not None and (not isinstance(labels, Tensor) or labels.shape != ids.shape):
            raise ValueError(
                f"ShardingCollator: {name} of shape {tuple(getattr(labels, 'shape', ()))} do not match input_ids of "
                f"shape {tuple(ids.shape)}; each token needs its own label."
            )
    if batch.get("inputs_embeds") is not None:  # PEFT's forward of a causal model says None
        raise NotImplementedError("ShardingCollator: inputs_embeds cannot be cut over ranks yet; give input_ids.")


def _take_documents(batch: dict[str, Any]) -> Documents | None:
    """The documents of a batch's one row; whatever marks them is taken out."""
    marks = {name: value for name in (*MARKS, "position_ids") if (value := batch.pop(name, None)) is not None}
    positions, (rows, n_tokens) = marks.get("position_ids"), batch["input_ids"].shape
    counts_on = positions is None or bool((positions == torch.arange(n_tokens, device=positions.device)).all())
    if counts_on and len(marks) <= (positions is not None):
        return None
    if rows > 1:
        raise NotImplementedError(
            "ShardingCollator: packed documents (position_ids that do not count from 0 in steps of 1) in a batch of "
            f"{rows} rows are not supported; give one row a batch, or one document a row."
        )
    documents = marked_documents(marks, n_tokens)
    if documents is not None and batch.get("attention_mask") is not None:
        raise NotImplementedError(
            "ShardingCollator: attention_mask beside packed documents: under a mask transformers takes a row for one "
            "document; leave it out."
        )
    if documents is None and not counts_on:
        assert positions is not None
        raise NotImplementedError(
            f"ShardingCollator: position_ids of a row go from {int(positions.min())} to {int(positions.max())} over "
            f"{n_tokens} tokens; they must count from 0, in each document again: make them so, or leave them out."
        )
    return documents


def _check_padding(mask: Tensor | None, labels: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dim() != 2 or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(
            f"ShardingCollator: attention_mask of shape {tuple(mask.shape)} marks more than padding on the right "
            "([batch, tokens], ones and then zeros in each row): set tokenizer.padding_side='right', and give no "
            "other mask."
        )
    if labels is not None:
        check_padding("ShardingCollator", mask == 0, labels)


def check_shard(
    arguments: dict[str, Any],
    sample_B: Tensor | None,
    group: SequenceParallelGroup,
    plan_of: Callable[[Tensor], ChunkPlan],
    documents: Documents | None = None,
) -> None:
    """Every rank of the group must hold its own part of the same samples, else all of them raise.

    A rank's tokens are told from a whole sequence by their positions alone, so these may not be guessed. Parts of
    different lengths would hang in the first exchange; parts of different samples would train on a mixture of them.

    Args:
        arguments: of the base model's forward.
        sample_B: what `ShardingCollator` made of each whole row; None: nothing was.
        group: the ranks.
        plan_of: how the sequence is cut of which a rank holds these tokens.
        documents: of the whole row, if it is packed.
    """
    if arguments.get("position_ids") is None or arguments.get("attention_mask") is not None:
        raise ValueError(
            "hf_fpdt: with sp_size above 1 the model takes a rank's part of a sequence, with position_ids and without "
            "attention_mask, as hf_fpdt.ShardingCollator makes it (FPDTTrainer and FPDTAccelerator use one). PEFT's "
            "prompt tuning drops position_ids: take LoRA."
        )
    ids = arguments.get("input_ids")
    tokens = ids if ids is not None else arguments["inputs_embeds"]
    batch, length = tokens.shape[:2]
    plan = plan_of(tokens)
    own, positions = own_tokens(plan, group.rank, tokens.device), arguments["position_ids"]
    own = own_positions(own, documents)
    sizes = torch.tensor([batch, length], device=tokens.device)
    sample = sizes.new_zeros(())
    if sample_B is not None:  # rows in another order are other samples
        sample = (sample_B * torch.arange(1, len(sample_B) + 1, device=sample_B.device)).sum().to(tokens.device)
    if documents is not None:
        sample = sample + sum(start * (index + 1) for index, start in enumerate(documents.starts)) % 2**40
    in_place = (positions == own).all() if positions.shape[-1] == length else sizes.new_zeros(())
    # Everything stays on the device until the group has seen it: the host waits once.
    batches, lengths, samples, places = group.extremes(torch.cat([sizes, torch.stack([sample, in_place.long()])]))
    if any(low != high for low, high in (batches, lengths, samples)):
        raise ValueError(
            "hf_fpdt: the ranks of a sequence-parallel group got different samples (rows {}..{}, tokens a rank "
            "{}..{}); they must read the same: shuffle and augment with the same seed on all of them.".format(
                *batches, *lengths
            )
        )
    if not places[0]:
        raise ValueError(
            f"hf_fpdt: position_ids are not those of a rank's part of a sequence cut in chunks of {plan.chunk_tokens} "
            f"tokens over {group.size} ranks; let ShardingCollator cut it, with the plugin that the model has."
        )
