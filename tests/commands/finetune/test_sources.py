"""Reading documents: what is text is read, what is not is refused by name or counted, nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from datasets import Dataset

from hf_fpdt.commands.finetune.sources import read_documents
from hf_fpdt.commands.options import UserMistake


def test_reads_files_folders_and_tables(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a.py").write_text("print('a')\n")
    (tmp_path / "folder" / "inner" / "b.txt").write_text("b\n")
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder" / "empty.txt").write_text("\n")
    parquet = tmp_path / "table.parquet"
    Dataset.from_dict({"body": ["first", "second"]}).to_parquet(parquet)
    assert read_documents([str(tmp_path / "folder")])["name"] == ["a.py", "inner/b.txt"]
    assert read_documents([str(tmp_path / "folder" / "a.py")])["text"] == ["print('a')\n"]
    assert read_documents([str(parquet)], text_column="body")["text"] == ["first", "second"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserMistake, match="no text or source file.*png 1"):
        read_documents([str(tmp_path)])


def lines(*records: object) -> bytes:
    """JSON lines; what is bytes already goes in as it is."""
    return b"".join(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records)


def parquet(**columns: list) -> bytes:
    file = BytesIO()
    Dataset.from_dict(columns).to_parquet(file)
    return file.getvalue()


CHAT = [{"role": "user", "content": "hello"}]
GOOD = {"text": "good"}
BROKEN = b'{"text": "half\n'
REFUSED = {
    "chat.jsonl": (
        lines(GOOD, {"text": CHAT}),
        "chat.jsonl line 2, column 'text'.*chat messages.*chat_template",
    ),
    "chat.parquet": (parquet(text=[CHAT]), "chat.parquet row 1, column 'text'.*chat messages.*apply_chat_template"),
    "ids.jsonl": (lines({"text": [1, 2]}), "line 1, column 'text' holds a list, not text; name the column"),
    "number.jsonl": (lines({"text": 3}), "number.jsonl line 1, column 'text' holds a number"),
    "number.parquet": (parquet(text=[1.5]), "number.parquet row 1, column 'text' holds a number"),
    "object.json": (lines([{"text": {"a": 1}}]), "object.json record 1, column 'text' holds an object"),
    "bytes.parquet": (parquet(text=[b"good", b"\xff\xfe"]), "row 2, column 'text' holds bytes that are not UTF-8"),
    "broken.jsonl": (lines(BROKEN, BROKEN, GOOD), "2 of 3 lines of .*broken.jsonl.* line 1: Unterminated string"),
    "list.jsonl": (lines(b'[\n{"text": "a"},\n{"text": "b"}\n]\n'), "3 of 4 lines of .*list.jsonl.* line 1: "),
    "column.jsonl": (lines({"body": "a", "id": 1}), "--text_column: .*column.jsonl has no column 'text'.*: body, id;"),
    "column.parquet": (parquet(body=["a"]), "--text_column: .*column.parquet has no column 'text'; its columns: body"),
    "column.csv": (b"body,id\na,1\n", "--text_column: .*column.csv has no column 'text'; its columns: body, id"),
    "quoted.csv": (b'text\none, two\nthree, four\n"good"\n', "2 of 3 lines.*line 2: 2 field"),
    "object2.json": (lines({"a": 1}), "object2.json holds an object, and is no list of records"),
    "numbers.json": (lines([1, 2]), "numbers.json holds a list without objects"),
    "syntax.json": (b"[1, 2", "syntax.json can't be read as JSON.*give a list of objects with a field 'text'"),
    "empty.txt": (b"", "empty.txt holds no text"),
    "empty.jsonl": (b"", "empty.jsonl holds no rows"),
    "empty.csv": (b"", "empty.csv holds no rows"),
    "empty.parquet": (b"", "empty.parquet can't be read: ArrowInvalid"),
    "broken.parquet": (b"PAR1 and nothing", "broken.parquet can't be read: ArrowInvalid"),
    "broken.txt.gz": (b"no gzip", "broken.txt.gz can't be read: BadGzipFile"),
    "cut.jsonl.gz": (gzip.compress(lines(GOOD))[:-9], "cut.jsonl.gz can't be read: EOFError"),
    "binary.txt": (b"\x89PNG\0\0", "binary.txt holds zero bytes"),
    "russian.txt": ("\u0434\u0430 ".encode("koi8-r") * 9, "russian.txt is not UTF-8, from byte 1 on; .*iconv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserMistake, match=words) as refused:
        read_documents([str(tmp_path / name)], say=lambda line: None)
    assert "\n" not in str(refused.value)


ODD_PATHS: dict[str, Callable[[Path], object]] = {
    "no file or folder": lambda path: None,
    "can't be read: OSError": lambda path: path.symlink_to("/proc/self/mem"),  # unreadable for root too
    "neither a file nor a folder": os.mkfifo,
    "nor a link to one": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("words", ODD_PATHS)
def test_a_path_that_cannot_be_read_is_refused_by_name(words: str, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    ODD_PATHS[words](path)
    with pytest.raises(UserMistake, match=f"book.txt.*{words}|{words}.*book.txt"):
        read_documents([str(path)])


def test_a_file_of_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("/proc/self/mem")
    with pytest.raises(UserMistake, match="b.txt can't be read: OSError"):
        read_documents([str(tmp_path)])


def test_broken_lines_are_counted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    said: list[str] = []
    surrogate, latin = b'{"text": "\\ud800"}\n', b'{"text": "\xe9"}\n'
    rows = [*({"text": f"good {i}"} for i in range(5)), BROKEN, surrogate, latin, [1], {"text": None}, {}, b"\n"]
    path.write_bytes(lines(*rows, {"text": "emoji \U0001f600", "name": "last"}))
    documents = read_documents([str(path)], say=said.append)
    assert documents["text"] == [*(f"good {i}" for i in range(5)), "emoji \U0001f600"]
    assert documents["name"][-1] == "last"
    assert [line.split(" (")[0] for line in said] == [
        f"broken lines left out: 4, the first: {path} line 6: Unterminated string starting, character 10",
        f"rows without text left out: 2, the first: {path} line 10",
    ]
    with pytest.raises(UserMistake, match="data.jsonl line 6: Unterminated string.*--broken_lines skip"):
        read_documents([str(path)], broken_lines="error")


def test_bytes_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(parquet(text=["na\u00efve".encode(), None, b"b"], name=["one", "two", None]))
    documents = read_documents([str(path)], say=lambda line: None)
    assert documents["text"] == ["na\u00efve", "b"] and documents["name"] == ["one", "table.parquet:3"]


def test_a_csv_keeps_long_fields_and_their_line_breaks(tmp_path: Path) -> None:
    long = "word " * 40_000 + '\nlast, "line"'
    quoted = long.replace('"', '""')
    path = tmp_path / "table.csv"
    path.write_text(f'id,text\n1,"{quoted}"\n2,too,many\n3,short\n')
    said: list[str] = []
    assert read_documents([str(path)], say=said.append)["text"] == [long, "short"]
    assert said == [f"broken lines left out: 1, the first: {path} line 4: 3 field(s) where the first line has 2"]


def test_a_folder_of_everything(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    said: list[str] = []
    (folder / "inner").mkdir(parents=True)
    contents = {
        "a.txt": b"\xef\xbb\xbfa\r\nb",
        "b.txt.gz": gzip.compress(b"gz"),
        "c.jsonl": lines({"text": "c1"}, {"text": "c2"}),
        "d.jsonl.gz": gzip.compress(lines({"text": "d"})),
        "e.csv": b"text\ne\n",
        "e.csv.gz": gzip.compress(b"text\nepacked\n"),
        "f.tsv": b"id\ttext\n1\tf\n",
        "g.parquet": parquet(text=["g"]),
        "h.json": json.dumps([{"text": "h"}]).encode(),
        "inner/i.json": lines({"text": "i1"}, {"text": "i2"}),
        "inner/latin.txt": "a caf\u00e9 in Latin-1".encode("latin-1"),
        "package.json": b'{"name": "no data"}',
        "settings.json": b"// no JSON\n{}",
        "table.csv": b"id,value\n1,2\n",
        "empty.jsonl": b"",
        "binary.txt": b"\0\1",
        "blank.txt": b" \n",
        "picture.png": b"\x89PNG",
        "LICENSE": b"free",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "inner" / "loop").symlink_to(folder)
    (folder / "nowhere.txt").symlink_to("missing.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "j.txt").write_text("j")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    texts = read_documents([str(folder)], say=said.append)["text"]
    assert texts == [
        *("a\nb", "gz", "c1", "c2", "d", "e", "epacked", "f", "g", "h"),
        *("i1", "i2", "a caf\ufffd in Latin-1", "j"),
    ]
    assert [line.split(", the first: ")[0] for line in said] == [
        "broken links and special files left out: 1",
        "files left out that are no text: 1",
        "blank documents left out: 1",
        "tables left out without rows: 1",
        "files with bytes that are not UTF-8, read as \ufffd: 1",
        "tables left out without a column 'text': 3",
        "files of other kinds left out: 2 (no ending 1, .png 1)",
    ]


def test_a_folder_with_data_of_another_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_bytes(lines({"body": "b"}))
    with pytest.raises(UserMistake, match="b.jsonl has no column 'text'; its columns: body"):
        read_documents([str(tmp_path)])
