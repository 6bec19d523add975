"""Documents of --data: text files, folders of them, tables, gzipped or not, and hub data sets.

What is asked for by name must be readable as text; in a folder, files of other kinds are passed over and counted.
What was left out is said in a line each, never silently.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError

from ..options import UserMistake, one_line
from .chat import conversation_of
from .skipped import Skipped
from .tables import READERS, NoRows, NotATable, Table, json_kind, open_unpacked, read_rows, unpacked_suffix

TEXT_SUFFIXES = frozenset(
    (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg")
    + (".py", ".pyi", ".js", ".ts", ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".go", ".rs")
    + (".rb", ".php", ".sh", ".lua", ".jl", ".r", ".scala", ".kt", ".swift", ".pl", ".sql", ".lean", ".v", ".hs")
)
# In a folder these hold all sorts of things beside the data; .jsonl and .parquet are data.
OFTEN_NO_DATA = frozenset((".json", ".csv", ".tsv"))
# Not found, offline, gated, made by a script, of a split that it lacks.
NO_HUB_DATA = (DatasetsError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
TEXT, CHAT = "text", "chat"
REPLACED = "\N{REPLACEMENT CHARACTER}"


class Document(NamedTuple):
    """One of them; the text of a conversation is JSON, see `chat`."""

    name: str
    text: str
    kind: str = TEXT


class NotText(UserMistake):
    """The file's bytes are no text."""


def read_documents(
    sources: Sequence[str],
    text_column: str = "text",
    broken_lines: str = "skip",
    say: Callable[[str], None] = print,
) -> Dataset:
    """All documents of all sources, as a data set with the columns name, text and kind; says what was left out."""
    reader = Reader(text_column, broken_lines == "error")
    kept: list[Document] = []
    for document in (document for source in sources for document in reader.documents(source)):
        if document.text.strip():
            kept.append(document)
        else:
            reader.skipped.add("blank documents left out", document.name)
    if not kept:
        raise UserMistake(
            f"data: {', '.join(sources)} holds no text{reader.left_out()}; give files, folders or tables with at "
            "least one document"
        )
    for line in reader.skipped.lines():
        say(line)
    # Plain strings end at 2 GiB a column.
    features = Features({"name": Value("string"), "text": Value("large_string"), "kind": Value("string")})
    columns = dict(zip(Document._fields, map(list, zip(*kept, strict=True)), strict=True))
    return Dataset.from_dict(columns, features=features)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong between here and the disk is one line that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserMistake(
            f"data: {path} can't be read: {one_line(error)}; check that it is whole and may be read, or leave it out"
        ) from error


@dataclass
class Reader:
    """How tables are read, and what was left out."""

    text_column: str
    strict: bool
    skipped: Skipped = field(default_factory=Skipped)

    def left_out(self) -> str:
        """To go into a message."""
        return "".join(f"; {line}" for line in self.skipped.lines())

    def documents(self, source: str) -> Iterator[Document]:
        """Every document of a file, a folder or a hub data set."""
        path = Path(source)
        with _reading(path):
            is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists() or path.is_symlink()
        if is_folder:
            yield from self._folder(path)
        elif is_file:
            yield from self._file(path, path.name)
        elif is_there:
            raise UserMistake(
                f"data: {path} is neither a file nor a folder, nor a link to one; give a file or a folder"
            )
        elif _looks_like_a_path(source):
            raise UserMistake(f"data: no file or folder {path}; give an existing one, or the name of a hub data set")
        else:
            yield from self._hub(source)

    def _file(self, path: Path, name: str) -> Iterator[Document]:
        with _reading(path):
            if unpacked_suffix(path) not in READERS:
                yield Document(name, self._text(path))
                return
            table = Table(path, self.text_column, self.skipped, self.strict)
            for number, fields in read_rows(table):
                yield from self._row(fields, f"{name}:{number}", table.where(number))

    def _folder(self, folder: Path) -> Iterator[Document]:
        files = sorted(self._files(folder, set()))
        if not files:
            raise UserMistake(
                f"data: the folder {folder} holds no text or source file and no table{self.left_out()}; read are "
                f"files ending in .txt, .md, .py and the like, {', '.join(READERS)}, each also as .gz"
            )
        for path in files:
            try:
                yield from self._file(path, path.relative_to(folder).as_posix())
            except NotText as error:
                self.skipped.add("files left out that are no text", str(error).removeprefix("data: "))
            except NoRows:
                self.skipped.add("tables left out without rows", str(path))
            except NotATable:
                if unpacked_suffix(path) not in OFTEN_NO_DATA:
                    raise
                self.skipped.add(f"tables left out without a column {self.text_column!r}", str(path))

    def _files(self, folder: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
        """Files that are read, in linked folders too; a folder that is met again, as in a loop, is not entered."""
        with _reading(folder):
            place = folder.stat()
            if (place.st_dev, place.st_ino) in entered:
                return
            entered.add((place.st_dev, place.st_ino))
            entries = [(path, path.is_dir(), path.is_file()) for path in sorted(folder.iterdir())]
        for path, is_folder, is_file in entries:
            if is_folder:
                yield from self._files(path, entered)
            elif not is_file:
                self.skipped.add("broken links and special files left out", str(path))
            elif unpacked_suffix(path) in TEXT_SUFFIXES or unpacked_suffix(path) in READERS:
                yield path
            else:
                self.skipped.add_other_file(path.suffix.lower())

    def _row(self, fields: Mapping[str, Any], name: str, where: str) -> Iterator[Document]:
        """The document of a table's row, if it holds one: a conversation before a text, unless a column is named."""
        name = _row_name(fields, name)
        conversation = conversation_of(fields, where) if self.text_column == TEXT else None
        if conversation is not None:
            yield Document(name, conversation, CHAT)
        elif (text := self._text_of(fields.get(self.text_column), where)) is not None:
            yield Document(name, text)

    def _text(self, path: Path) -> str:
        """The file as UTF-8, whose few wrong bytes are replaced and said; with more of them it is no text."""
        with open_unpacked(path) as file:
            content = file.read()
        remedy = "give text, as UTF-8 (iconv -f FROM -t UTF-8), not packed but with gzip"
        if b"\0" in content:
            raise NotText(f"data: {path} holds zero bytes, as binary files and UTF-16 do; {remedy}")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            text = content.decode("utf-8-sig", errors="replace")
            wrong = text.count(REPLACED)
            if wrong * 10 > len(text):
                raise NotText(f"data: {path} is not UTF-8, from byte {error.start + 1} on; {remedy}") from error
            self.skipped.add(f"files with bytes that are not UTF-8, read as {REPLACED}", f"{path} ({wrong} of them)")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _text_of(self, value: Any, where: str) -> str | None:
        """The text of a field, None where there is none; what is no text is refused."""
        if value is None:
            self.skipped.add("rows without text left out", where)
            return None
        if isinstance(value, str):
            return value
        column = f"{where}, column {self.text_column!r}"
        if not isinstance(value, bytes):
            raise UserMistake(f"--text_column: {column} holds {_kind_and_remedy(value)}")
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserMistake(
                f"--text_column: {column} holds bytes that are not UTF-8, from byte {error.start + 1} on; give a "
                "column of text"
            ) from error

    def _hub(self, name: str) -> Iterator[Document]:
        try:
            rows = load_dataset(name, split="train")
        except NO_HUB_DATA as error:
            raise UserMistake(
                f"data: {name!r} is neither a file or folder here nor a hub data set that can be read with a "
                f"'train' split ({type(error).__name__}); check the path or the name"
            ) from error
        table = Table(Path(name), self.text_column, self.skipped, self.strict)
        table.check_columns(rows.column_names)
        wanted = [column for column in rows.column_names if column in table.wanted]
        for number, fields in enumerate(rows.select_columns(wanted), start=1):
            yield from self._row(fields, f"{name}:{number}", f"{name} row {number}")


def _row_name(fields: Mapping[str, Any], place: str) -> str:
    name = fields.get("name")
    if isinstance(name, bytes):
        name = name.decode(errors="replace")
    return place if name is None else str(name).encode(errors="replace").decode()


def _looks_like_a_path(source: str) -> bool:
    suffix = unpacked_suffix(Path(source))
    return source.startswith(("/", ".", "~")) or suffix in READERS or suffix in TEXT_SUFFIXES


def _kind_and_remedy(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return (
            "a list of chat messages, not text: call their column 'messages', which is rendered by the tokenizer's "
            "apply_chat_template, or name a column of text"
        )
    in_json = isinstance(value, list | dict | int | float)
    kind = json_kind(value) if in_json else f"a value of type {type(value).__name__}"
    return f"{kind}, not text; name the column that holds a document's text"
