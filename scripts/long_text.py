"""Documents in, training and evaluation windows out.

A document is one text: a file, or a row of a table. Documents are held out whole, so that no evaluation window shares
a document with a training window. A window is a list of pieces (document, start, stop) that together hold at most
max_length_tokens; which pieces go where is integer arithmetic (`plan_windows`), done before any token is copied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from user_error import UserError

TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = frozenset(
    (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg")
    + (".py", ".pyi", ".js", ".ts", ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".go", ".rs")
    + (".rb", ".php", ".sh", ".lua", ".jl", ".r", ".scala", ".kt", ".swift", ".pl", ".sql", ".lean", ".v", ".hs")
)
IGNORED_LABEL = -100


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


def read_documents(sources: Sequence[str], text_column: str = "text") -> Dataset:
    """All documents of files, folders, tables and hub data sets, as a data set with the columns name and text."""
    parts = [_read_source(source, text_column) for source in sources]
    documents = concatenate_datasets(parts).filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(documents) == 0:
        raise UserError(
            f"data: {', '.join(sources)} holds no text; give files, folders or tables with at least one document"
        )
    return documents


def _read_source(source: str, text_column: str) -> Dataset:
    path = Path(source)
    if path.is_dir():
        return _read_files(_text_files(path), root=path)
    if path.suffix.lower() in TABLE_FORMATS:
        return _read_table(path, text_column)
    if path.is_file():
        return _read_files([path], root=path.parent)
    return _read_hub(source, text_column)


def _text_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES)
    if not files:
        raise UserError(
            f"data: the folder {folder} holds no text or source file; allowed: files ending in .txt, .md, .py and the "
            "like; give a .jsonl or .parquet file by its own name"
        )
    return files


def _read_files(files: Sequence[Path], root: Path) -> Dataset:
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return Dataset.from_dict({"name": [path.relative_to(root).as_posix() for path in files], "text": texts})


def _read_table(path: Path, text_column: str) -> Dataset:
    if not path.is_file():
        raise UserError(f"data: no file {path}; give an existing file or folder, or the name of a hub data set")
    try:
        table = load_dataset(TABLE_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # datasets raises many kinds; each one means the file cannot be read as a table
        raise UserError(f"data: {path} can't be read as {path.suffix}: {error}") from error
    return _name_and_text(table, text_column, path.name)


def _read_hub(name: str, text_column: str) -> Dataset:
    try:
        table = load_dataset(name, split="train")
    except Exception as error:  # not found, offline, gated, script-based ...: the user has to change the name
        raise UserError(
            f"data: {name!r} is neither a file or folder here nor a hub data set that can be read with a "
            f"'train' split ({type(error).__name__}); check the path or the name"
        ) from error
    return _name_and_text(table, text_column, name)


def _name_and_text(table: Dataset, text_column: str, source: str) -> Dataset:
    if text_column not in table.column_names:
        columns = ", ".join(table.column_names)
        raise UserError(f"--text-column: {source} has no column {text_column!r}; allowed: {columns}")
    names = table["name"] if "name" in table.column_names else [f"{source}:{row}" for row in range(len(table))]
    return Dataset.from_dict({"name": [str(name) for name in names], "text": table[text_column]})


def hold_out(documents: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split whole documents: (training, held out). At least one of each."""
    held_out_documents = max(1, round(len(documents) * fraction))
    if held_out_documents >= len(documents):
        raise UserError(
            f"--eval-fraction: {len(documents)} document(s) and a fraction of {fraction} leave nothing to "
            "train on; give more documents, or other documents with --eval-data"
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = sorted(order[:held_out_documents])
    return documents.select(sorted(order[held_out_documents:])), documents.select(held_out)


def without_held_out_texts(training: Dataset, held_out: Dataset) -> Dataset:
    """Drop from training every document whose text is also held out, so that no copy leaks."""
    hashes = {sha256(text.encode()).digest() for text in held_out["text"]}
    kept = [row for row, text in enumerate(training["text"]) if sha256(text.encode()).digest() not in hashes]
    if not kept:
        raise UserError("data: every training document is also held out; give --data other documents than --eval-data")
    return training.select(kept)


def tokenise(documents: Dataset, tokenizer: Any, what: str) -> Dataset:
    """Token ids of each document (column input_ids), each closed by an end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, which must stand between documents; set eos_token in it"
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        rows = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [_closed(list(ids), tokenizer.eos_token_id) for ids in rows]}

    columns = documents.column_names
    encoded = documents.map(encode, batched=True, batch_size=16, remove_columns=["text"], desc=f"tokenising {what}")
    assert set(encoded.column_names) == (set(columns) - {"text"}) | {"input_ids"}
    return encoded.with_format("numpy")


def _closed(ids: list[int], eos_id: int) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, eos_id]


def document_tokens(tokenised: Dataset) -> list[int]:
    """The length of each document in tokens."""
    return [len(ids) for ids in tokenised["input_ids"]]


def plan_windows(lengths_tokens: Sequence[int], max_length_tokens: int) -> list[Window]:
    """Full windows of every long document, then the short documents and the tails one after another.

    Every token is in exactly one window, and all windows but the last are full.
    """
    windows: list[Window] = []
    tails: list[Piece] = []
    for document, length in enumerate(lengths_tokens):
        full = length // max_length_tokens * max_length_tokens
        starts = range(0, full, max_length_tokens)
        windows += [(Piece(document, start, start + max_length_tokens),) for start in starts]
        if length > full:
            tails.append(Piece(document, full, length))
    return windows + list(_filled(tails, max_length_tokens))


def _filled(pieces: Sequence[Piece], max_length_tokens: int) -> Iterator[Window]:
    window: list[Piece] = []
    room = max_length_tokens
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + room)
            window.append(Piece(piece.document, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(window)
                window, room = [], max_length_tokens
    if window_tokens(tuple(window)) > 1:  # one token alone has nothing to predict
        yield tuple(window)


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
    """Windows as input_ids and labels, read from the tokenised documents when asked for."""

    def __init__(self, tokenised: Dataset, windows: Sequence[Window]) -> None:
        self.tokenised = tokenised
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = [
            torch.as_tensor(self.tokenised[piece.document]["input_ids"][piece.start : piece.stop], dtype=torch.long)
            for piece in self.windows[index]
        ]
        input_ids = torch.cat(pieces)
        return {"input_ids": input_ids, "labels": input_ids.clone()}


@dataclass(frozen=True)
class RightPadding:
    """Collator: shorter windows are padded on the right with ignored labels. Causal attention then needs no mask."""

    pad_id: int

    def __call__(self, windows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([w["input_ids"] for w in windows], batch_first=True, padding_value=self.pad_id),
            "labels": pad([w["labels"] for w in windows], batch_first=True, padding_value=IGNORED_LABEL),
        }
