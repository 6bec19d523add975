"""Documents in, training and evaluation windows out.

A document is one text (`sources` reads them). Documents are held out whole, so that no evaluation window shares
a document with a training window. A window is a list of pieces (document, start, stop) that together hold at most
max_length_tokens; which pieces go where is integer arithmetic (`plan_windows`), done before any token is copied. No
document sees another one in its window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad

from ...labels import IGNORE_INDEX
from ...training import LongDocuments, PackingCounts, fitting_pieces, pack
from ..options import UserMistake, mistakes
from .chat import Conversations
from .sources import CHAT


@dataclass(frozen=True)
class Piece:
    """Tokens start..stop of one document."""

    document: int
    start: int
    stop: int


Window = tuple[Piece, ...]


def window_tokens(window: Window) -> int:
    """How many tokens a window holds."""
    return sum(piece.stop - piece.start for piece in window)


def hold_out(documents: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split whole documents: (training, held out). At least one of each."""
    held_out_documents = max(1, round(len(documents) * fraction))
    if len(documents) == 1:
        raise UserMistake(
            f"data: there is one document only, {documents[0]['name']}, and one is held out to evaluate on; give more "
            "documents, or one to hold out with --eval_data"
        )
    if held_out_documents >= len(documents):
        raise UserMistake(
            f"--eval_fraction: {len(documents)} document(s) and a fraction of {fraction} leave nothing to "
            "train on; give a smaller fraction, more documents, or other documents with --eval_data"
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = sorted(order[:held_out_documents])
    return documents.select(sorted(order[held_out_documents:])), documents.select(held_out)


def without_held_out_texts(training: Dataset, held_out: Dataset) -> Dataset:
    """Drop from training every document whose text is also held out, so that no copy leaks."""
    hashes = {sha256(text.encode()).digest() for text in held_out["text"]}
    kept = [row for row, text in enumerate(training["text"]) if sha256(text.encode()).digest() not in hashes]
    if not kept:
        raise UserMistake(
            "data: the text of every training document is also held out; give --data and --eval_data different "
            "documents, or more of them"
        )
    return training.select(kept)


def check_tokenizer(tokenizer: Any, known_ids: int | None = None) -> None:
    """Refuse one without an end of sequence that the model knows; its ids from `known_ids` on have no embedding."""
    if tokenizer.eos_token_id is None:
        raise UserMistake(
            "--model: the tokenizer has no end-of-sequence token, which must stand between documents; set "
            "eos_token in it"
        )
    _check_known([tokenizer.eos_token_id], "the end of each document", tokenizer, known_ids)


def _check_known(ids: Sequence[int], where: str, tokenizer: Any, known_ids: int | None) -> None:
    """Refuse the ids that are used and unknown; that a vocabulary is larger than the model's alone does no harm."""
    if known_ids is not None and (largest := max(ids, default=0)) >= known_ids:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserMistake(
            f"--model: {where} has the token {token!r} with id {largest}; the tokenizer has {len(tokenizer)} tokens, "
            f"the model knows {known_ids}; give the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save_pretrained() first"
        )


def tokenise(documents: Dataset, tokenizer: Any, what: str, known_ids: int | None = None) -> Dataset:
    """Token ids of each document (column input_ids), texts closed by an end-of-sequence token.

    Where there are conversations among them, labels too (column labels): of texts all tokens are learnt. Ids that the
    model does not know, `known_ids` and above, are refused.
    """
    check_tokenizer(tokenizer, known_ids)
    kinds = documents["kind"] if "kind" in documents.column_names else []
    labelled, conversations = CHAT in kinds, Conversations(tokenizer)

    def of_texts(texts: list[str]) -> list[list[int]]:
        rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return [_closed(list(ids), tokenizer.eos_token_id) for ids in rows]

    def of_any(name: str, text: str, kind: str) -> tuple[list[int], list[int]]:
        return conversations.tokens(text, name) if kind == CHAT else (of_texts([text])[0],) * 2

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        if labelled:
            rows = [of_any(*each) for each in zip(batch["name"], batch["text"], batch["kind"], strict=True)]
            found["input_ids"], found["labels"] = map(list, zip(*rows, strict=True))
        else:
            found["input_ids"] = of_texts(batch["text"])
        for name, ids in zip(batch["name"], found["input_ids"], strict=True):
            _check_known(ids, f"document {name}", tokenizer, known_ids)
        return found

    spent = [name for name in ("text", "kind") if name in documents.column_names]
    encoded = documents.map(encode, batched=True, batch_size=16, remove_columns=spent, desc=f"tokenising {what}")
    return encoded.with_format("numpy")


def with_something_to_learn(tokenised: Dataset) -> Dataset:
    """The documents with a label behind their first token: a conversation without an assistant has none."""
    if "labels" not in tokenised.column_names:
        return tokenised
    return tokenised.select(
        [row for row in range(len(tokenised)) if (tokenised[row]["labels"][1:] != IGNORE_INDEX).any()]
    )


def _closed(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, eos_id]


def document_tokens(tokenised: Dataset) -> list[int]:
    """The length of each document in tokens."""
    return [len(ids) for ids in tokenised["input_ids"]]


def teaches(tokenised: Dataset, piece: Piece) -> bool:
    """Whether a token of the piece has a label, its first one aside: of a conversation that was cut some have none."""
    if "labels" not in tokenised.column_names:
        return True
    labels = tokenised[piece.document]["labels"][piece.start + 1 : piece.stop]
    return bool((labels != IGNORE_INDEX).any())


def plan_windows(
    lengths_tokens: Sequence[int],
    max_length_tokens: int,
    long_documents: LongDocuments = "drop",
    taught: Callable[[Piece], bool] = lambda piece: True,
) -> tuple[list[Window], PackingCounts]:
    """Whole documents side by side, so that windows are as full as can be; what was left out or cut is counted.

    Args:
        long_documents: of those longer than a window: "drop" leaves them out, "cut" cuts them in pieces of a window,
            "error" refuses them.
        taught: whether there is something to learn in a piece of a document that was cut; others are left out.
    """
    counts, pieces = PackingCounts(max_length_tokens), list[Piece]()
    with mistakes(ValueError):
        for document, length in enumerate(lengths_tokens):
            parts = fitting_pieces(length, max_length_tokens, long_documents, counts)
            found = [Piece(document, part.start, part.stop) for part in parts]
            pieces += filter(taught, found) if len(found) > 1 else found
    # One token alone has nothing to predict.
    lengths = [piece.stop - piece.start for piece in pieces]
    windows = [tuple(pieces[index] for index in row) for row in pack(lengths, max_length_tokens)]
    windows = [window for window in windows if any(piece.stop - piece.start > 1 for piece in window)]
    counts.rows, counts.documents = len(windows), sum(map(len, windows))
    counts.tokens = sum(map(window_tokens, windows))
    return windows, counts


def plan_eval_windows(
    lengths_tokens: Sequence[int], max_length_tokens: int, max_documents: int, max_windows: int
) -> list[Window]:
    """Equally long windows of single documents: the first of each document, then the second of each, and so on.

    One document a window, so that a token's position says how much of its own document comes before it; equal
    lengths, so that every position averages over the same windows. Where no document reaches max_length_tokens, the
    longest sets it.
    """
    length = min(max_length_tokens, max(lengths_tokens))
    long_enough = [document for document, tokens in enumerate(lengths_tokens) if tokens >= length][:max_documents]
    rounds = max(lengths_tokens) // length
    candidates = ((document, turn * length) for turn in range(rounds) for document in long_enough)
    fitting = ((document, start) for document, start in candidates if start + length <= lengths_tokens[document])
    return [
        (Piece(document, start, start + length),)
        for (document, start), _ in zip(fitting, range(max_windows), strict=False)
    ]


class WindowDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows as input_ids, labels and the lengths of their documents, read from the documents when asked for.

    Args:
        tokenised: documents with `input_ids` and, where they differ from these, `labels`.
        windows: which pieces of them.
        filled_to: tokens that each window is filled up to, by a document of `pad_id` without labels, so that all steps
            are alike; 0: none is.
    """

    def __init__(self, tokenised: Dataset, windows: Sequence[Window], filled_to: int = 0, pad_id: int = 0) -> None:
        self.tokenised, self.windows = tokenised, windows
        self.filled_to, self.pad_id = filled_to, pad_id
        self._labels = "labels" if "labels" in tokenised.column_names else "input_ids"

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        documents = [(self.tokenised[piece.document], piece) for piece in self.windows[index]]
        input_ids, labels = (
            torch.cat([torch.as_tensor(row[name][p.start : p.stop], dtype=torch.long) for row, p in documents])
            for name in ("input_ids", self._labels)
        )
        lengths = [piece.stop - piece.start for piece in self.windows[index]]
        if missing := max(0, self.filled_to - len(input_ids)):
            input_ids = pad(input_ids, (0, missing), value=self.pad_id)
            labels = pad(labels, (0, missing), value=IGNORE_INDEX)
            lengths.append(missing)
        return {"input_ids": input_ids, "labels": labels.clone(), "seq_lengths": torch.tensor(lengths)}
