"""Documents and windows: every token once, held-out documents whole, positions that mean what they say."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from hf_fpdt.commands.finetune.sources import read_documents
from hf_fpdt.commands.finetune.windows import (
    Piece,
    WindowDataset,
    document_tokens,
    hold_out,
    plan_eval_windows,
    plan_windows,
    teaches,
    tokenise,
    window_tokens,
    without_held_out_texts,
)
from hf_fpdt.commands.options import UserMistake, tokens, tokens_text
from hf_fpdt.training import LongDocuments, PackingCollator
from tests.helpers.app_support import stories, write_jsonl, write_tiny_checkpoint

LENGTHS = [[5, 7, 3], [10, 20, 30], [1, 1, 1], [100], [9, 11, 63, 2, 10], [1]]


def tokenised_rows(*rows: list[int]) -> Dataset:
    return Dataset.from_dict({"name": [str(i) for i in range(len(rows))], "input_ids": list(rows)}).with_format(
        "numpy"
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("long_documents", ["drop", "cut"])
def test_every_token_is_in_one_window_or_counted(lengths: list[int], long_documents: LongDocuments) -> None:
    windows, counts = plan_windows(lengths, 10, long_documents)
    pieces = [piece for window in windows for piece in window]
    seen = Counter((piece.document, token) for piece in pieces for token in range(piece.start, piece.stop))
    long = [length for length in lengths if length > 10] if long_documents == "drop" else []
    everything = {
        (document, token) for document, length in enumerate(lengths) for token in range(length) if length not in long
    }
    lost = everything - set(seen)
    assert set(seen.values()) <= {1} and set(seen) <= everything
    assert all(lengths[document] % 10 == 1 for document, _ in lost)  # one token alone has nothing to predict
    assert (counts.dropped, counts.dropped_tokens, counts.tokens) == (len(long), sum(long), len(seen))
    assert counts.cut == (sum(length > 10 for length in lengths) if long_documents == "cut" else 0)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_windows_hold_whole_documents_and_no_two_fit_into_one(lengths: list[int]) -> None:
    windows, _ = plan_windows(lengths, 10)
    sizes = [window_tokens(window) for window in windows]
    assert all(piece.stop - piece.start == lengths[piece.document] for window in windows for piece in window)
    assert all(size <= 10 for size in sizes) and all(a + b > 10 for a, b in zip(sizes, sizes[1:], strict=False))


def test_long_documents_are_cut_or_refused_when_asked() -> None:
    windows, _ = plan_windows([25], 10, "cut")
    assert windows == [(Piece(0, 0, 10),), (Piece(0, 10, 20),), (Piece(0, 20, 25),)]
    with pytest.raises(UserMistake, match="a document has 25 tokens, and a row 10"):
        plan_windows([5, 25], 10, "error")


def test_pieces_of_a_conversation_in_which_nothing_is_learnt_are_left_out() -> None:
    """A step on them would move weights by the optimizer's memory alone; a label of a first token is none."""
    labels = [[-100] * 12 + [5] * 3 + [-100] * 5 + [6] + [-100] * 4, [-100, 1, 2]]
    rows = {"name": ["0", "1"], "input_ids": [[7] * 25, [8, 1, 2]], "labels": labels}
    tokenised = Dataset.from_dict(rows).with_format("numpy")
    windows, counts = plan_windows(document_tokens(tokenised), 10, "cut", partial(teaches, tokenised))
    assert {piece for window in windows for piece in window} == {Piece(0, 10, 20), Piece(1, 0, 3)}
    assert (counts.tokens, counts.documents, counts.cut) == (13, 2, 1)
    data = WindowDataset(tokenised, windows, filled_to=10)
    assert all((data[index]["labels"][1:] != -100).any() for index in range(len(data)))


def test_documents_side_by_side_are_told_apart() -> None:
    tokenised = tokenised_rows([7, 8, 0], [9, 0])
    windows, _ = plan_windows(document_tokens(tokenised), 10)
    window = WindowDataset(tokenised, windows)[0]
    assert window["input_ids"].tolist() == [7, 8, 0, 9, 0] and window["seq_lengths"].tolist() == [3, 2]
    assert window["labels"].tolist() == window["input_ids"].tolist()
    filled = WindowDataset(tokenised, windows, filled_to=8, pad_id=5)[0]
    assert filled["input_ids"].tolist() == [7, 8, 0, 9, 0, 5, 5, 5] and filled["seq_lengths"].tolist() == [3, 2, 3]
    assert filled["labels"].tolist() == [7, 8, 0, 9, 0, -100, -100, -100]
    batch = PackingCollator()([filled])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 8, 0, -100, 0, -100, -100, -100]]


def test_evaluation_windows_are_of_one_document_and_one_length() -> None:
    windows = plan_eval_windows([35, 8, 20, 12], 10, max_documents=16, max_windows=16)
    assert all(len(window) == 1 and window_tokens(window) == 10 for window in windows)
    assert [window[0].document for window in windows] == [0, 2, 3, 0, 2, 0]  # in turn, then the longer ones again
    assert [window[0].start for window in windows] == [0, 0, 0, 10, 10, 20]


def test_evaluation_windows_shrink_to_the_longest_document() -> None:
    assert plan_eval_windows([4, 6], 10, max_documents=16, max_windows=16) == [(Piece(1, 0, 6),)]


def test_evaluation_respects_both_limits() -> None:
    windows = plan_eval_windows([100, 100, 100], 10, max_documents=2, max_windows=5)
    assert len(windows) == 5 and {window[0].document for window in windows} == {0, 1}


def test_held_out_documents_are_whole_and_never_trained_on(tmp_path: Path) -> None:
    documents = read_documents([str(write_jsonl(tmp_path / "data.jsonl", stories(20)))])
    training, held_out = hold_out(documents, fraction=0.2, seed=3)
    assert len(held_out) == 4 and set(training["name"]).isdisjoint(held_out["name"])
    assert sorted([*training["text"], *held_out["text"]]) == sorted(documents["text"])


def test_hold_out_depends_on_the_seed_alone(tmp_path: Path) -> None:
    documents = read_documents([str(write_jsonl(tmp_path / "data.jsonl", stories(20)))])
    chosen = [tuple(hold_out(documents, 0.2, seed)[1]["name"]) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_copy_of_a_held_out_text_is_dropped_from_training(tmp_path: Path) -> None:
    texts = stories(3)
    training = read_documents([str(write_jsonl(tmp_path / "train.jsonl", [*texts, texts[1]]))])
    held_out = read_documents([str(write_jsonl(tmp_path / "held.jsonl", [texts[1]]))])
    assert without_held_out_texts(training, held_out)["text"] == [texts[0], texts[2]]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    documents = read_documents([str(write_jsonl(tmp_path / "one.jsonl", stories(1)))])
    with pytest.raises(UserMistake, match="one document only, one0.*--eval_data"):
        hold_out(documents, 0.5, seed=0)


def test_two_copies_of_a_document_cannot_be_split_either(tmp_path: Path) -> None:
    documents = read_documents([str(write_jsonl(tmp_path / "two.jsonl", stories(1) * 2))])
    with pytest.raises(UserMistake, match="--eval_data.*more of them"):
        without_held_out_texts(*hold_out(documents, 0.5, seed=0))


def test_each_tokenised_document_ends_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path / "model"))
    texts = [*stories(2), f"ends already{tokenizer.eos_token}"]
    rows = tokenise(read_documents([str(write_jsonl(tmp_path / "data.jsonl", texts))]), tokenizer, "texts")
    for ids in rows["input_ids"]:
        assert ids[-1] == tokenizer.eos_token_id and (ids == tokenizer.eos_token_id).sum() == 1


def test_an_id_without_an_embedding_is_refused_where_it_is_used(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path / "model"))
    known = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    plain = read_documents([str(write_jsonl(tmp_path / "plain.jsonl", stories(2)))])
    with_extra = read_documents([str(write_jsonl(tmp_path / "extra.jsonl", ["a", "b <extra>"]))])
    assert len(tokenise(plain, tokenizer, "texts", known)) == 2  # a larger vocabulary alone does no harm
    words = f"document extra1 has the token '<extra>' with id {known}; .* {known + 1} tokens, the model knows {known}"
    with pytest.raises(UserMistake, match=words):
        tokenise(with_extra, tokenizer, "texts", known)
    tokenizer.eos_token = "<extra>"
    with pytest.raises(UserMistake, match="the end of each document has the token '<extra>'"):
        tokenise(plain, tokenizer, "texts", known)


@pytest.mark.parametrize(("text", "number"), [("8192", 8192), ("8K", 8192), ("1m", 1024**2), ("1.5K", 1536)])
def test_tokens_are_read_as_they_are_written(text: str, number: int) -> None:
    assert tokens(text) == number
    assert tokens(tokens_text(number).replace(",", "")) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.0001K", "K", "1G"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="tokens"):
        tokens(text)
