"""Documents in rows: each token once, rows full, nothing lost in silence, and a batch that tells documents apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_fpdt import FPDTPlugin, FPDTTrainer, PackedRows, PackedStream, PackingCollator
from hf_fpdt.training.packing import pack
from tests.helpers.models import tiny
from tests.helpers.support import assert_rejects

ROOM = 32
LENGTHS = (5, 40, 12, 1, 31, 32, 9, 33, 2, 7, 7, 64, 20)
Sample = dict[str, list[int]]


def samples(lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    """Each token tells its document and its place; every other sample has labels of its own."""
    made: list[Sample] = []
    for index, length in enumerate(lengths):
        ids = [1000 * index + place for place in range(length)]
        made.append({"input_ids": ids, **({"labels": [-100, *ids[1:]]} if index % 2 else {})})
    return made


KEPT = {token for each in samples() if len(each["input_ids"]) <= ROOM for token in each["input_ids"]}


def rows_of(kind: str, long_documents: Any = "drop", lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Any], Any]:
    """(rows, counts) of a data set, or of a stream with few waiting documents."""
    if kind == "stream":
        stream = PackedStream(iter(samples(lengths)), ROOM, long_documents, buffer=3)
        return list(stream), stream.counts
    packed = PackedRows(samples(lengths), ROOM, long_documents)
    return [packed[index] for index in range(len(packed))], packed.counts


def check_rows(rows: list[Any], expected: set[int]) -> None:
    tokens = Counter(token for row in rows for token in row["input_ids"])
    assert set(tokens.values()) == {1} and set(tokens) == expected
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= ROOM
        edges = [sum(row["seq_lengths"][:index]) for index in range(len(row["seq_lengths"]) + 1)]
        for start, stop in zip(edges, edges[1:], strict=False):
            piece = row["input_ids"][start:stop]
            assert piece == list(range(piece[0], piece[0] + len(piece))), "a document is in one piece"
            labels = row["labels"][start:stop]
            assert labels == piece or labels == [-100, *piece[1:]]


@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("long_documents", ["drop", "cut"])
def test_every_token_is_in_one_row_and_what_is_not_is_counted(kind: str, long_documents: str) -> None:
    rows, counts = rows_of(kind, long_documents)
    kept = {index for index, length in enumerate(LENGTHS) if length <= ROOM or long_documents == "cut"}
    expected = {1000 * index + place for index in kept for place in range(LENGTHS[index])}
    check_rows(rows, expected)
    assert counts.tokens == len(expected) and counts.rows == len(rows)
    dropped = {"drop": (3, 40 + 33 + 64, 0), "cut": (0, 0, 3)}[long_documents]
    assert (counts.dropped, counts.dropped_tokens, counts.cut) == dropped
    assert counts.filled == pytest.approx(len(expected) / (len(rows) * ROOM))
    twice = [*rows, rows[0]]
    merged = [{**rows[0], "seq_lengths": [len(rows[0]["input_ids"])]}, *rows[1:]]
    broken = {"a row lost": rows[1:], "twice": twice}
    if len(rows[0]["seq_lengths"]) > 1:
        broken["boundaries lost"] = merged
    assert_rejects(lambda variant: check_rows(variant, expected), broken)


def test_what_is_dropped_and_cut_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hf_fpdt"):
        for kind in ("rows", "stream"):
            rows_of(kind)
    rows, warned, stream = caplog.messages
    assert "a document of 40 tokens is longer than a row and is left out" in warned
    for message in (rows, stream):
        assert "10 documents, 126 tokens in" in message and "% filled; dropped 3 (137 tokens), cut 0" in message


def test_a_stream_that_is_left_says_what_it_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """As by `max_steps`: most streams are longer than a run."""
    with caplog.at_level("INFO", logger="hf_fpdt"):
        assert len(list(islice(PackedStream(iter(samples()), ROOM, buffer=3), 2))) == 2
    assert "tokens in 2 rows of 32" in caplog.messages[-1] and "dropped 1 (40 tokens)" in caplog.messages[-1]


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_long_documents_can_be_an_error(kind: str) -> None:
    with pytest.raises(ValueError, match='a document has 40 tokens, and a row 32: .*"drop".*"cut"'):
        rows_of(kind, "error")
    with pytest.raises(ValueError, match="no document is left to pack.*dropped 1"):
        PackedRows(samples((40,)), ROOM)


def lognormal(mean: float, sigma: float, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=generator) * sigma + math.log(mean) - sigma**2 / 2
    return [int(length) for length in drawn.exp().clamp(min=2)]


# CoderForge's trajectories: median 38K, 95 % under 71K, longest 184K.
CORPORA: dict[str, tuple[list[int], int]] = {
    "lognormal, mean 8K": (lognormal(8192, 1.2, 5000), 256 * 1024),
    "trajectories": ([min(length, 184 * 1024) for length in lognormal(41_700, 0.37, 3000)], 256 * 1024),
    "chats, mean 1.5K": (lognormal(1500, 1.0, 20_000), 32 * 1024),
}


@pytest.mark.parametrize("corpus", CORPORA)
def test_rows_are_98_percent_full(corpus: str) -> None:
    lengths, room = CORPORA[corpus]
    lengths = [length for length in lengths if length <= room]

    def check(rows: list[list[int]]) -> None:
        assert sum(lengths) >= 0.98 * room * len(rows)

    rows = pack(lengths, room)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= room for row in rows)
    check(rows)
    if corpus == "trajectories":
        assert_rejects(check, {"in the order they come": [*in_order(lengths, room)]})
    # A sixteenth of every length, so that as many documents are a sixteenth of the tokens.
    lengths, room = [max(1, length // 16) for length in lengths], room // 16
    stream = PackedStream(({"input_ids": [0] * length} for length in lengths), room)
    streamed = [row["seq_lengths"] for row in stream]
    assert sorted(length for row in streamed for length in row) == sorted(lengths)
    check(streamed)


def naive_fit(lengths: list[int], room: int, *, best: bool) -> list[list[int]]:
    """Decreasing, each into the fullest row that it fits in, or into the first one."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room_left = [room - sum(lengths[each] for each in row) for row in rows]
        fits = [(left if best else 0, at) for at, left in enumerate(room_left) if left >= lengths[index]]
        rows[min(fits)[1]].append(index) if fits else rows.append([index])
    return rows


def room_left(lengths: list[int], rows: list[list[int]], room: int) -> list[int]:
    return sorted(room - sum(lengths[index] for index in row) for row in rows)


@pytest.mark.parametrize("room", [32, 1500, 2048])
def test_documents_go_where_the_least_room_is_left(room: int) -> None:
    """Best-fit decreasing, of random lengths; rooms of one number, and of several, are found."""
    generator, differs = torch.Generator().manual_seed(0), False
    for _ in range(20):
        lengths = torch.randint(1, room + 1, (60,), generator=generator).tolist()
        lengths = [max(1, length // int(torch.randint(1, 6, (), generator=generator))) for length in lengths]
        best, first = (naive_fit(lengths, room, best=best) for best in (True, False))
        assert room_left(lengths, pack(lengths, room), room) == room_left(lengths, best, room)
        differs |= room_left(lengths, first, room) != room_left(lengths, best, room)
    assert differs or room == 32, "first-fit would do"


def in_order(lengths: list[int], room: int) -> Iterator[list[int]]:
    row: list[int] = []
    for index, length in enumerate(lengths):
        if sum(lengths[each] for each in row) + length > room:
            yield row
            row = []
        row.append(index)
    yield row


def test_nobody_waits_for_ever_in_a_stream() -> None:
    """Long documents fill rows by themselves; a short one leaves when others left twice without it."""
    lengths = (3, *(30,) * 40)
    stream = PackedStream(samples(lengths), ROOM, buffer=4)
    rows = [row["input_ids"][0] // 1000 for row in stream]
    assert 0 in rows[:6]
    # Documents of the fullest rows leave first: 20 + 12 and 16 + 16 of those that wait, then those that are left.
    firsts = [row["seq_lengths"] for row in PackedStream(samples((20, 9, 16, 25, 16, 12)), ROOM, buffer=6)]
    assert firsts == [[20, 12], [16, 16], [25], [9]]
    assert list(stream) == list(stream), "a second pass is the first again"


def assert_batch(collate: Callable[[list[Any]], Any], **more: Any) -> None:
    features = [samples()[0], samples()[2], {**samples()[4]}]
    batch, theirs = collate(features), DataCollatorWithFlattening()(features)
    length = theirs["input_ids"].shape[1]
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    for name in batch:
        assert torch.equal(batch[name][:, :length], theirs[name]), name
    assert batch["input_ids"].shape[1] == more.get("length", length)
    assert (batch["labels"][:, length:] == -100).all() and (batch["input_ids"][:, length:] == 7).all()
    rest = batch["position_ids"][0, length:]
    assert torch.equal(rest, torch.arange(len(rest)))


def test_a_batch_is_what_transformers_flattening_makes() -> None:
    assert_batch(PackingCollator())
    assert_batch(PackingCollator(length=64, pad_token_id=7), length=64)
    shifted: Callable[[list[Any]], Any] = lambda features: {  # noqa: E731
        **(batch := PackingCollator()(features)),
        "position_ids": batch["position_ids"].roll(1, 1),
    }
    assert_rejects(assert_batch, {"boundaries off by one": shifted})
    (labels,) = PackingCollator()([{"input_ids": [5, 6, 7], "labels": None}])["labels"].tolist()
    assert labels == [-100, 6, 7]


def test_packed_rows_go_on_as_their_documents() -> None:
    """Several rows a batch, from a loader; TRL's packed rows have the same column."""
    loader = DataLoader(PackedRows(samples(), ROOM), batch_size=2, collate_fn=PackingCollator())
    documents: list[list[int]] = []
    for batch in loader:
        starts = (batch["position_ids"][0] == 0).nonzero().view(-1).tolist()
        assert (batch["labels"][0, starts] == -100).all()
        documents += [part.tolist() for part in batch["input_ids"][0].tensor_split(starts[1:])]
    kept = [sample["input_ids"] for sample in samples() if len(sample["input_ids"]) <= ROOM]
    assert sorted(documents) == sorted(kept)
    with pytest.raises(ValueError, match="seq_lengths add up to 3, and the row has 5 tokens"):
        PackingCollator()([{"input_ids": [1] * 5, "seq_lengths": [1, 2]}])


def test_positions_of_a_row_tell_its_documents_apart() -> None:
    """A stock Trainer leaves them in, and takes lengths away, which no model takes."""
    found = PackingCollator()([{"input_ids": [1] * 5, "position_ids": [0, 1, 0, 1, 2]}, {"input_ids": [1] * 2}])
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    trainer = Trainer(
        tiny(), TrainingArguments("unused", use_cpu=True), PackingCollator(), PackedRows(samples(), ROOM)
    )
    documents = sum(int((batch["position_ids"] == 0).sum()) for batch in trainer.get_train_dataloader())
    assert documents == sum(length <= ROOM for length in LENGTHS)


WRONG_POSITIONS: dict[str, tuple[dict[str, Any], str]] = {
    "other documents": ({"position_ids": [0, 1, 0, 1, 2], "seq_lengths": [3, 2]}, "restart for 2, or elsewhere"),
    "no first token": ({"position_ids": [1, 2, 0, 1, 2]}, "of a row of 5 tokens are expected to count from 0"),
    "a gap": ({"position_ids": [0, 1, 5, 6, 7]}, "expected to count from 0"),
    "too many": ({"position_ids": [0, 1, 2, 3, 4, 5]}, "expected to count from 0"),
}


@pytest.mark.parametrize("case", WRONG_POSITIONS)
def test_positions_that_are_of_no_documents_are_refused(case: str) -> None:
    marks, message = WRONG_POSITIONS[case]
    with pytest.raises(ValueError, match=message):
        PackingCollator()([{"input_ids": [1] * 5, **marks}])


@pytest.mark.parametrize("lengths", [(0,), (33,)])
def test_only_documents_that_fit_are_packed(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="documents of 1 to 32 tokens are expected"):
        pack(lengths, ROOM)


def test_a_data_set_of_datasets_is_packed_by_its_lengths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = datasets.Dataset.from_list([{"input_ids": each["input_ids"]} for each in samples()])
    shuffled = documents.shuffle(seed=1)
    rows = PackedRows(shuffled, ROOM)
    check_rows([rows[index] for index in range(len(rows))], KEPT)
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda *_: pytest.fail("a document was read"))
    assert [len(row) for row in PackedRows(shuffled, ROOM).rows] == [len(row) for row in rows.rows]


@pytest.mark.parametrize("own_shards", [False, True])
def test_workers_of_a_loader_share_a_stream(own_shards: bool) -> None:
    stream: Any = samples()
    if own_shards:
        stream = datasets.Dataset.from_list([{"input_ids": each["input_ids"]} for each in samples()])
        stream = stream.to_iterable_dataset(num_shards=4)
    packed = PackedStream(stream, ROOM)
    loader = DataLoader(packed, batch_size=None, num_workers=2, multiprocessing_context="fork")
    tokens = Counter(int(token) for row in loader for token in row["input_ids"])
    assert set(tokens.values()) == {1}
    assert set(tokens) == KEPT


@pytest.mark.parametrize("kind", ["rows", "stream", "columns"])
def test_a_trainer_keeps_what_tells_documents_apart(kind: str, tmp_path: Path) -> None:
    """Trainer takes columns away that are no argument of the model; without them a row would be one document."""
    lengths = (5, 9, 3, 12)
    documents = [{"input_ids": [3 + (7 * i + p) % 60 for p in range(length)]} for i, length in enumerate(lengths)]
    rows: Any = PackedRows(documents, ROOM)
    made = {"rows": rows, "stream": PackedStream(documents, ROOM), "columns": datasets.Dataset.from_list([rows[0]])}
    model = tiny(dtype=torch.float32)
    total, labels = 0.0, sum(lengths) - len(lengths)
    for each in documents:
        ids = torch.tensor([each["input_ids"]])
        total += float(model(input_ids=ids, labels=ids, num_items_in_batch=1).loss.detach())
    options: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    args = TrainingArguments(str(tmp_path), **options)
    trainer = FPDTTrainer(model, args, PackingCollator(), made[kind], fpdt_plugin=FPDTPlugin(chunk_tokens=8))
    assert args.remove_unused_columns
    trainer.train()

    def check(loss: float) -> None:
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-3)

    check(total / labels)
    whole = torch.tensor([rows[0]["input_ids"]])
    leaky = tiny(dtype=torch.float32)(input_ids=whole, labels=whole).loss.item()
    assert_rejects(check, {"one document": leaky})


def labels_of_every_token(features: list[Any]) -> dict[str, torch.Tensor]:
    """A collator that leaves labels of first tokens in, which nothing predicts."""
    batch = PackingCollator()(features)
    return {**batch, "labels": batch["input_ids"].clone()}


def test_a_step_is_divided_by_the_labels_of_all_its_batches(tmp_path: Path) -> None:
    """Accumulated rows of other numbers of documents; what a document's end would predict is in no sum."""
    rows = [[5, 9, 3], [12, 1, 1, 1, 6], [17], [2, 2, 2, 14]]
    documents = [[[3 + (7 * i + p) % 60 for p in range(n)] for i, n in enumerate(row)] for row in rows]
    data = [{"input_ids": sum(row, []), "seq_lengths": [len(each) for each in row]} for row in documents]
    model, total, labels = tiny(dtype=torch.float32), 0.0, 0
    for ids in (torch.tensor([each]) for row in documents for each in row if len(each) > 1):
        total += float(model(input_ids=ids, labels=ids, num_items_in_batch=1).loss.detach())
        labels += ids.shape[1] - 1
    options: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    options |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "remove_unused_columns": False}
    losses = {}
    for name in ("right", "counted"):
        args = TrainingArguments(str(tmp_path / name), **options)
        with pytest.MonkeyPatch.context() as patch:
            if name == "counted":
                patch.setattr("hf_fpdt.training.trainer.ignore_first_tokens", lambda *_: None)
            collator: Any = labels_of_every_token
            plugin = FPDTPlugin(chunk_tokens=8)
            trainer = FPDTTrainer(tiny(dtype=torch.float32), args, collator, data, fpdt_plugin=plugin)
            trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]

    def check(loss: float) -> None:
        assert loss == pytest.approx(total / labels, rel=1e-4)

    check(losses["right"])
    assert_rejects(check, {"labels of first tokens are counted": losses["counted"]})
