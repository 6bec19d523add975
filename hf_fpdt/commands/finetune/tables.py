"""Rows of tables: JSON lines, JSON, CSV, TSV and Parquet, each also under .gz.

A line that is no row (broken JSON, half a surrogate pair, a field too many) is skipped and counted, or refused with
`strict`; a file most of whose lines are broken is of another kind than its name says, and always refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..options import UserMistake
from .chat import CHAT_COLUMNS
from .skipped import Skipped

Row = tuple[int, dict[str, Any]]  # the number of its line or record, from 1, and its fields
MOST_CHARACTERS = 2**31 - 1  # of a field in a .csv; Python's own limit is 131,072


class NotATable(UserMistake):
    """The file has no text column: in a folder such files may lie beside the data."""


class NoRows(NotATable):
    """The file has no rows at all, as an empty part of many may have none."""


class BrokenLine(ValueError):
    """One line that is no row."""


@dataclass
class Table:
    """One file while it is read: what to look for, how to treat broken lines, what was seen so far."""

    path: Path
    text_column: str
    skipped: Skipped
    strict: bool = False
    rows: int = 0
    broken: int = 0
    first_broken: str = ""
    columns: dict[str, None] = field(default_factory=dict)

    def where(self, number: int) -> str:
        """The place of a row, for messages."""
        return f"{self.path} {self._place(number)}"

    def _place(self, number: int) -> str:
        units = {".json": "record", ".parquet": "row"}
        return f"{units.get(unpacked_suffix(self.path), 'line')} {number}"

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that are read where they are there."""
        return (self.text_column, "name", *(CHAT_COLUMNS if self.text_column == "text" else ()))

    def _holds_documents(self, names: Iterable[str]) -> bool:
        found = set(names) & set(self.wanted)
        return bool(found & {self.text_column, "messages"}) or {"prompt", "completion"} <= found

    def check_columns(self, columns: Iterable[str]) -> None:
        """Refuse a table without the text column, by the names that it has."""
        names = list(columns)
        if not names:
            raise NoRows(f"data: {self.path} holds no rows; give a table with at least one, or leave it out")
        if not self._holds_documents(names):
            shown = ", ".join(name[:40] for name in names[:12]) + (", ..." if len(names) > 12 else "")
            raise NotATable(
                f"--text_column: {self.path} has no column {self.text_column!r}; its columns: {shown}; name the one "
                "that holds a document's text, or leave the file out"
            )

    def checked(self, lines: Iterable[tuple[int, Any]], fields_of: Callable[[Any], dict[str, Any]]) -> Iterator[Row]:
        """The rows of numbered lines; `fields_of` raises BrokenLine for one that is none."""
        for number, line in lines:
            try:
                fields = fields_of(line)
                for name in self.wanted:
                    _check_unicode(fields.get(name))
            except BrokenLine as error:
                self._add_broken(number, str(error))
                continue
            self.rows += 1
            self.columns.update(dict.fromkeys(fields))
            yield number, fields
        if self.broken > self.rows:
            raise UserMistake(
                f"data: {self.broken} of {self.broken + self.rows} lines of {self.path} can't be read, the first is "
                f"{self.first_broken}; check that the file is what its name says"
            )
        self.check_columns(self.columns)

    def _add_broken(self, number: int, reason: str) -> None:
        if self.strict:
            raise UserMistake(
                f"data: {self.where(number)}: {reason}; mend it, or leave such lines out with --broken_lines skip"
            )
        self.broken += 1
        self.first_broken = self.first_broken or f"{self._place(number)}: {reason}"
        self.skipped.add("broken lines left out", f"{self.where(number)}: {reason}")


def _check_unicode(text: object) -> None:
    """Python's strings may hold lone surrogates, files and tokenizers may not."""
    try:
        if isinstance(text, (list, dict)):
            json.dumps(text, ensure_ascii=False).encode()
        elif isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        raise BrokenLine(f"half a surrogate pair, or a byte that is not UTF-8, character {error.start + 1}") from error


def unpacked_suffix(path: Path) -> str:
    """How the name ends, in small letters, .gz left out: '.jsonl' of 'a.jsonl.gz'."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def open_unpacked(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_rows(table: Table) -> Iterator[Row]:
    """Every row of the table's file, by the format that its name says."""
    with open_unpacked(table.path) as file:
        yield from READERS[unpacked_suffix(table.path)](file, table)


def json_kind(value: object) -> str:
    """What a reader of JSON calls the value."""
    kinds = {str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")


def _json_lines(lines: Iterable[bytes], table: Table) -> Iterator[Row]:
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return table.checked(numbered, _parsed)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BrokenLine(f"{error.msg.removesuffix(' at')}, character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        raise BrokenLine(f"a byte that is not UTF-8, byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise BrokenLine(str(error)) from error
    return _record(record)


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BrokenLine(f"{json_kind(value)} in place of an object with named fields")
    return value


def _json(file: IO[bytes], table: Table) -> Iterator[Row]:
    """A list of records, or one record, or JSON lines under this name."""
    content = file.read()
    wanted = f"a list of objects with a field {table.text_column!r}, or one such object on each line"
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        lines = content.split(b"\n")
        if not _begins_with_an_object(lines):
            raise NotATable(f"data: {table.path} can't be read as JSON ({error}); give {wanted}") from error
        return _json_lines(lines, table)
    if isinstance(records, dict) and table._holds_documents(records):
        records = [records]
    if not isinstance(records, list) or not any(isinstance(record, dict) for record in records):
        holds = "a list without objects" if isinstance(records, list) else json_kind(records)
        raise NotATable(f"data: {table.path} holds {holds}, and is no list of records; give {wanted}")
    return table.checked(enumerate(records, start=1), _record)


def _begins_with_an_object(lines: list[bytes]) -> bool:
    try:
        return bool(_parsed(next((line for line in lines if line.strip()), b"")))
    except BrokenLine:
        return False


def _separated(file: IO[bytes], table: Table, delimiter: str) -> Iterator[Row]:
    """Lines of fields; one that has more or fewer than the first line is broken, as one with an unquoted comma is."""
    csv.field_size_limit(MOST_CHARACTERS)
    # What is not UTF-8 becomes surrogates, which are found in `checked`: one broken line, not a lost file.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _fields(csv.reader(text, delimiter=delimiter, strict=True))
    header = next((fields for _, fields in lines if isinstance(fields, list)), [])
    table.check_columns(header)

    def named(fields: list[str] | BrokenLine) -> dict[str, Any]:
        if isinstance(fields, BrokenLine):
            raise fields
        if len(fields) != len(header):
            raise BrokenLine(f"{len(fields)} field(s) where the first line has {len(header)}")
        return dict(zip(header, fields, strict=True))

    table.columns.update(dict.fromkeys(header))
    return table.checked(lines, named)


def _fields(lines: Any) -> Iterator[tuple[int, list[str] | BrokenLine]]:
    """Numbered lines that are not empty; what has broken quotes comes as the reason."""
    while True:
        try:
            fields = next(lines, None)
        except csv.Error as error:
            yield lines.line_num, BrokenLine(str(error))
            continue
        if fields is None:
            return
        if fields:
            yield lines.line_num, fields


def _parquet(file: IO[bytes], table: Table) -> Iterator[Row]:
    packed = table.path.suffix.lower() == ".gz"
    parquet = pq.ParquetFile(io.BytesIO(file.read()) if packed else file)
    table.check_columns(parquet.schema_arrow.names)
    wanted = [name for name in table.wanted if name in parquet.schema_arrow.names]
    number = 0
    for batch in parquet.iter_batches(batch_size=64, columns=wanted):
        columns = [_as_bytes(column) for column in batch.columns]
        for fields in pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist():
            number += 1
            yield number, fields


def _as_bytes(column: pa.Array) -> pa.Array:
    """Strings as bytes, so that whoever decodes them can say which row is not UTF-8; other types as they are."""
    strings = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if strings else column


READERS: MappingProxyType[str, Callable[[IO[bytes], Table], Iterator[Row]]] = MappingProxyType(
    {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": partial(_separated, delimiter=","),
        ".tsv": partial(_separated, delimiter="\t"),
        ".parquet": _parquet,
    }
)
