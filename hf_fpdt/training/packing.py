"""Documents of every length in rows of one length: which go together, and the batch that tells them apart.

Best-fit decreasing: from the longest document down, each goes into the row with the least room that is enough for it.
Of a stream that is done with the documents that wait: the fullest rows leave, the others' documents go on waiting for
better company, twice at most. No document is cut but on request: a trajectory that ends in its midst teaches never to
stop.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..labels import IGNORE_INDEX

logger = logging.getLogger(__name__)

LongDocuments = Literal["drop", "cut", "error"]
# Documents that wait in a stream: enough that rows of 64K and more are over 98 % full.
BUFFER_DOCUMENTS = 2048
# What a row calls the lengths of its documents; TRL's packed data sets call them so.
LENGTHS, POSITIONS = "seq_lengths", "position_ids"


@dataclass
class PackingCounts:
    """What was packed, and what was not.

    Attributes:
        room: tokens of a row.
        rows: that were made.
        documents, tokens: in them.
        dropped, cut: documents longer than a row: left out, or cut in several.
        dropped_tokens: of those left out.
    """

    room: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    cut: int = 0

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are of documents."""
        return self.tokens / max(1, self.rows * self.room)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens in {self.rows:,} rows of {self.room:,}, "
            f"{100 * self.filled:.1f} % filled; dropped {self.dropped:,} ({self.dropped_tokens:,} tokens), "
            f"cut {self.cut:,}"
        )


class _OpenRows:
    """Rows by the room that is left in them; the one with the least that is enough is found in a few steps."""

    BITS = 512  # of one number: two of them are looked at for rows of 256K tokens

    def __init__(self, room: int) -> None:
        self._rows = defaultdict[int, list[list[int]]](list)
        self._left = [0] * (room // self.BITS + 1)  # a bit for each size of room that some row has left
        self._some = 0  # a bit for each of these numbers that is not 0

    def put(self, left: int, row: list[int]) -> None:
        """A row with so much room left."""
        number, bit = divmod(left, self.BITS)
        self._rows[left].append(row)
        self._left[number] |= 1 << bit
        self._some |= 1 << number

    def take(self, least: int) -> tuple[int, list[int]] | None:
        """(room left, row) of the fullest one with at least so much room, taken out; None where there is none."""
        number, bit = divmod(least, self.BITS)
        found = self._left[number] >> bit << bit
        if not found:
            later = self._some >> (number + 1) << (number + 1)
            if not later:
                return None
            number = _lowest(later)
            found = self._left[number]
        left = number * self.BITS + _lowest(found)
        rows = self._rows[left]
        row = rows.pop()
        if not rows:
            self._left[number] ^= 1 << (left % self.BITS)
            self._some ^= 0 if self._left[number] else 1 << number
        return left, row


def _lowest(bits: int) -> int:
    """The place of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of documents, by their places in `lengths`, none of which is longer than `room`: best-fit decreasing.

    Raises:
        ValueError: a document is longer, or has no token.
    """
    if wrong := [length for length in lengths if not 0 < length <= room]:
        raise ValueError(f"hf_fpdt: pack(room={room}): documents of 1 to {room} tokens are expected, got {wrong[0]}.")
    rows, opened = list[list[int]](), _OpenRows(room)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        found = opened.take(lengths[index])
        left, row = (room, list[int]()) if found is None else found
        if found is None:
            rows.append(row)
        row.append(index)
        opened.put(left - lengths[index], row)
    return rows


@dataclass
class _Waiting:
    """A document of a stream, or a piece of one, that has no row yet.

    Attributes:
        length: in tokens.
        value: its ids and labels.
        passed_over: how often rows left without it.
    """

    length: int
    value: dict[str, list[int]]
    passed_over: int = 0


def _leaving(waiting: list[_Waiting], room: int) -> tuple[list[list[_Waiting]], list[_Waiting]]:
    """Rows of at least half of the documents that wait, and the documents that go on waiting.

    First those with a document that was passed over twice, then the fullest: whose documents find no better company.
    """
    rows = [[waiting[index] for index in row] for row in pack([each.length for each in waiting], room)]
    rows.sort(key=lambda row: (max(each.passed_over for each in row) < 2, -sum(each.length for each in row)))
    left, leaving = len(waiting), list[list[_Waiting]]()
    for row in rows:
        if 2 * left <= len(waiting) and max(each.passed_over for each in row) < 2:
            break
        leaving.append(row)
        left -= len(row)
    staying = [each for row in rows[len(leaving) :] for each in row]
    for each in staying:
        each.passed_over += 1
    return leaving, staying


def fitting_pieces(length: int, room: int, long_documents: LongDocuments, counts: PackingCounts) -> list[slice]:
    """What of a document goes into rows: all of it, or of one longer than a row nothing, or pieces; it is counted.

    Raises:
        ValueError: it is longer, and that is an error.
    """
    if length <= room:
        return [slice(0, length)] if length else []
    if long_documents == "error":
        raise ValueError(
            f"hf_fpdt: a document has {length:,} tokens, and a row {room:,}: take longer rows, or long_documents="
            '"drop" (leave it out) or "cut" (in pieces, of which only the last one teaches how it ends).'
        )
    if long_documents == "cut":
        counts.cut += 1
        return [slice(start, min(start + room, length)) for start in range(0, length, room)]
    counts.dropped += 1
    counts.dropped_tokens += length
    return []


def _lengths(documents: Any) -> Iterator[int]:
    """Tokens of each document; of a data set of `datasets` without reading them one by one."""
    if hasattr(documents, "select_columns") and hasattr(documents, "with_format"):
        for table in documents.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
            for part in table["input_ids"].chunks:
                yield from part.value_lengths().to_pylist()
    else:
        yield from (len(documents[index]["input_ids"]) for index in range(len(documents)))


def _documents_of(sample: Mapping[str, Any]) -> dict[str, list[int]]:
    """Ids and labels of a sample as lists; its labels are its ids where it has none."""
    ids = _listed(sample["input_ids"])
    return {"input_ids": ids, "labels": _listed(_labels_of(sample))}


def _listed(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _row(pieces: Sequence[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Its positions say where documents begin, too: an argument of models, which a stock Trainer leaves in."""
    row: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", POSITIONS)}
    for piece in pieces:
        for name, values in row.items():
            values += range(len(piece["input_ids"])) if name == POSITIONS else piece[name]
    return {**row, LENGTHS: [len(piece["input_ids"]) for piece in pieces]}


class PackedRows(Dataset[dict[str, list[int]]]):
    """A data set of documents as rows of at most `max_length` tokens; which go together is settled once.

    Args:
        documents: samples with `input_ids` and, if they differ from these, `labels`; of known number.
        max_length: tokens of a row.
        long_documents: longer ones are left out ("drop"), cut in pieces ("cut"), or an error ("error").

    Attributes:
        counts: what was packed; logged too.

    Raises:
        ValueError: a document is longer than a row and that is an error, or none is left.
    """

    def __init__(self, documents: Any, max_length: int, long_documents: LongDocuments = "drop") -> None:
        self.documents, self.counts = documents, PackingCounts(max_length)
        self._pieces: list[tuple[int, slice]] = []
        for index, length in enumerate(_lengths(documents)):
            pieces = fitting_pieces(length, max_length, long_documents, self.counts)
            self._pieces += [(index, piece) for piece in pieces]
        lengths = [piece.stop - piece.start for _, piece in self._pieces]
        if not lengths:
            raise ValueError(f"hf_fpdt: no document is left to pack ({self.counts}); take longer rows (max_length).")
        self.rows = pack(lengths, max_length)
        self.counts.rows, self.counts.documents, self.counts.tokens = len(self.rows), len(lengths), sum(lengths)
        logger.info("hf_fpdt: packed %s", self.counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        found = []
        for at in self.rows[index]:
            document, piece = self._pieces[at]
            whole = _documents_of(self.documents[document])
            found.append({name: values[piece] for name, values in whole.items()})
        return _row(found)


class PackedStream(IterableDataset[dict[str, list[int]]]):
    """A stream of documents as a stream of rows, each filled from a buffer of waiting documents.

    Args:
        documents: an iterable of samples with `input_ids` and, if they differ from these, `labels`.
        max_length: tokens of a row.
        long_documents: as in `PackedRows`.
        buffer: documents that wait; the more, the fuller rows are.

    Attributes:
        counts: of the pass that runs or ran last; logged when it ends, or is left.
    """

    def __init__(
        self,
        documents: Iterable[Any],
        max_length: int,
        long_documents: LongDocuments = "drop",
        buffer: int = BUFFER_DOCUMENTS,
    ) -> None:
        self.documents, self.max_length, self.long_documents = documents, max_length, long_documents
        self.buffer = buffer
        self.counts = PackingCounts(max_length)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        # The streams of `datasets` give each worker of a loader its own documents; of others all pack the same.
        shared = worker is not None and not hasattr(self.documents, "num_shards")
        for number, row in enumerate(self._rows()):
            if worker is None or not shared or number % worker.num_workers == worker.id:
                yield row

    def _rows(self) -> Iterator[dict[str, list[int]]]:
        counts = self.counts = PackingCounts(self.max_length)
        waiting = list[_Waiting]()
        try:
            for sample in self.documents:
                waiting += self._pieces(sample, counts)
                if len(waiting) >= self.buffer:
                    leaving, waiting = _leaving(waiting, self.max_length)
                    yield from (self._counted([each.value for each in row]) for row in leaving)
            for row in pack([each.length for each in waiting], self.max_length):
                yield self._counted([waiting[index].value for index in row])
        finally:  # most runs end before their stream does
            logger.info("hf_fpdt: packed %s", counts)

    def _pieces(self, sample: Mapping[str, Any], counts: PackingCounts) -> Iterator[_Waiting]:
        whole, dropped = _documents_of(sample), counts.dropped
        length = len(whole["input_ids"])
        for piece in fitting_pieces(length, self.max_length, self.long_documents, counts):
            yield _Waiting(piece.stop - piece.start, {name: values[piece] for name, values in whole.items()})
        if counts.dropped > dropped == 0:
            logger.warning(
                "hf_fpdt: a document of %s tokens is longer than a row and is left out, as all that are will be; how "
                "many is said when the stream ends",
                f"{length:,}",
            )

    def _counted(self, pieces: Sequence[Mapping[str, list[int]]]) -> dict[str, list[int]]:
        row = _row(pieces)
        self.counts.rows += 1
        self.counts.documents += len(pieces)
        self.counts.tokens += len(row["input_ids"])
        return row

    def set_epoch(self, epoch: int) -> None:
        """Handed on to the stream, which may shuffle by it."""
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)


@dataclass(frozen=True)
class PackingCollator:
    """All samples of a batch in one packed row [1, T]: documents, or rows of `PackedRows`, `PackedStream` or TRL.

    The result has `input_ids`, `labels`, of which those of first tokens count for nothing, and `position_ids`, which
    restart with each document: what transformers' own attention functions tell them apart by, too.

    Attributes:
        length: the row is filled up to a multiple of it, so that steps are alike; 0: it is not.
        pad_token_id: what fills it, as a document of its own without labels.
    """

    length: int = 0
    pad_token_id: int = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        named = [{"input_ids": feature["input_ids"], "labels": _labels_of(feature)} for feature in features]
        lengths = [length for feature in features for length in _lengths_of(feature)]
        missing = -sum(lengths) % self.length if self.length else 0
        lengths += [missing] if missing else []
        batch = {}
        for name, filling in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX)):
            parts = [torch.as_tensor(feature[name], dtype=torch.long) for feature in named]
            batch[name] = torch.cat([*parts, torch.full((missing,), filling)])[None]
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORE_INDEX)
        return batch


def _labels_of(sample: Mapping[str, Any]) -> Any:
    """Its ids where it has none."""
    labels = sample.get("labels")
    return sample["input_ids"] if labels is None else labels


def _lengths_of(feature: Mapping[str, Any]) -> list[int]:
    """Of its documents, by what says where they begin.

    Raises:
        ValueError: that is of another row, or they disagree.
    """
    tokens, lengths, positions = len(feature["input_ids"]), feature.get(LENGTHS), feature.get(POSITIONS)
    by_positions = [tokens] if positions is None else _lengths_by(_listed(positions), tokens)
    lengths = by_positions if lengths is None else [length for length in _listed(lengths) if length]
    if sum(lengths) != tokens:
        raise ValueError(f"PackingCollator: {LENGTHS} add up to {sum(lengths)}, and the row has {tokens} tokens.")
    if positions is not None and by_positions != lengths:
        raise ValueError(
            f"PackingCollator: {LENGTHS} say that a row has {len(lengths)} documents, and its {POSITIONS} restart for "
            f"{len(by_positions)}, or elsewhere; make them agree, or give one of them."
        )
    return lengths


def _lengths_by(positions: list[int], tokens: int) -> list[int]:
    starts = [place for place, position in enumerate(positions) if position == 0]
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], tokens], strict=True)]
    if positions != [place for length in lengths for place in range(length)] or len(positions) != tokens:
        raise ValueError(
            f"PackingCollator: {POSITIONS} of a row of {tokens} tokens are expected to count from 0, in each document "
            "again; make them so, or leave them out."
        )
    return lengths
