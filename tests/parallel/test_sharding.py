"""The sharding collator: the ranks' parts put together are the batch, with its labels shifted as a whole."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from hf_fpdt import ShardingCollator
from hf_fpdt.labels import IGNORE_INDEX
from tests.helpers.support import assert_rejects

CHUNK = 12  # a multiple of 1, 2, 3 and 4
PAD = 7
Batch = dict[str, Any]


def stacked(features: list[Batch]) -> Batch:
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}


def rows(length: int, batch: int = 1, **more: Tensor) -> list[Batch]:
    """Samples whose ids tell their place, and labels of which some do not count."""
    made = []
    for index in range(batch):
        ids = torch.arange(length) + 100 * (index + 1)
        labels = torch.where(torch.arange(length) % 5 == 3, IGNORE_INDEX, ids + 1000)
        made.append({"input_ids": ids, "labels": labels, **more})
    return made


def cut(features: list[Batch], sp: int, rank: int, chunk: int = CHUNK) -> Batch:
    return ShardingCollator(stacked, sp, rank, chunk, PAD)(features)


def own_tokens(length: int, sp: int, rank: int, chunk: int = CHUNK) -> Tensor:
    """Piece `rank` of every chunk, by torch's own cutting: what the layers of a model expect."""
    return torch.cat([part.chunk(sp)[rank] for part in torch.arange(length + -length % sp).split(chunk)])


def check_parts(features: list[Batch], sp: int, cut_of: Callable[[int], Batch]) -> None:
    """Every rank has its place's ids, positions and next tokens, and together they have each token once."""
    whole = stacked(features)
    length = whole["input_ids"].shape[1]
    missing = -length % sp
    ids = pad(whole["input_ids"], (0, missing), value=PAD)
    following = pad(whole["labels"], (0, missing + 1), value=IGNORE_INDEX)[:, 1:]
    for rank in range(sp):
        part, own = cut_of(rank), own_tokens(length, sp, rank)
        assert set(part) - {"fpdt_padding"} == {"input_ids", "position_ids", "labels", "shift_labels", "fpdt_sample"}
        assert torch.equal(part["position_ids"], own.expand(len(features), -1)), "positions"
        assert torch.equal(part["input_ids"], ids[:, own]), "ids"
        for name in ("labels", "shift_labels"):
            assert torch.equal(part[name], following[:, own]), name
    places = torch.cat([cut_of(rank)["position_ids"][0] for rank in range(sp)])
    assert torch.equal(places.sort().values, torch.arange(length + missing))


@pytest.mark.parametrize("sp", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_of_all_ranks_are_the_batch(sp: int, batch: int) -> None:
    for length in range(1, 71):
        features = rows(length, batch)
        check_parts(features, sp, partial(cut, features, sp))


def test_labels_count_once_over_the_ranks() -> None:
    for length in (1, 2, 13, 47):
        counted = sum(int((cut(rows(length), 3, rank)["shift_labels"] != IGNORE_INDEX).sum()) for rank in range(3))
        assert counted == int((rows(length)[0]["labels"][1:] != IGNORE_INDEX).sum())


@pytest.mark.parametrize("length", [24, 35, 47])
def test_the_check_rejects_broken_cuts(length: int) -> None:
    sp, features = 2, rows(length, 2)
    whole = ShardingCollator(stacked, 1, 0, CHUNK, PAD)(features)
    number = {"fpdt_sample": whole.pop("fpdt_sample")}
    padded = {name: pad(value, (0, -length % sp), value=PAD) for name, value in whole.items()}

    def contiguous(rank: int) -> Batch:
        return {**number, **{name: value.chunk(sp, dim=1)[rank] for name, value in padded.items()}}

    def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[int], Batch]:
        return lambda rank: {**(part := cut(features, sp, rank)), name: change(part[name])}

    broken: dict[str, Callable[[int], Batch]] = {
        "contiguous halves": contiguous,
        "another chunk size": lambda rank: cut(features, sp, rank, chunk=8),
        "every rank is rank 0": lambda rank: cut(features, sp, 0),
        "ranks swapped": lambda rank: cut(features, sp, 1 - rank),
        "labels shifted after the cut": changed("shift_labels", lambda t: pad(t[:, 1:], (0, 1), value=IGNORE_INDEX)),
        "labels not shifted": changed("labels", lambda t: t - 1),
        "positions from 0": changed("position_ids", lambda t: torch.arange(t.shape[1]).expand_as(t)),
        "last token lost": changed("input_ids", lambda t: t[:, :-1]),
    }
    check_parts(features, sp, lambda rank: cut(features, sp, rank))
    assert_rejects(lambda variant: check_parts(features, sp, variant), broken)


def test_a_sample_has_one_number_on_every_rank_and_others_another() -> None:
    first, second = rows(20, 2)
    numbers = {int(cut([row], 2, rank)["fpdt_sample"]) for row in (first, second) for rank in (0, 1)}
    assert len(numbers) == 2
    swapped = {**first, "input_ids": first["input_ids"].flip(0)}
    masked = {**first, "labels": first["labels"].masked_fill(torch.arange(20) < 10, IGNORE_INDEX)}
    numbers |= {int(cut([row], 2, 0)["fpdt_sample"]) for row in (swapped, masked)}
    assert len(numbers) == 4


def test_padding_is_the_pad_token_without_a_label() -> None:
    last = cut(rows(13), 2, 1)
    assert last["input_ids"][0, -1] == PAD and last["shift_labels"][0, -1] == IGNORE_INDEX
    assert cut(rows(13), 2, 0)["shift_labels"][0, -1] == IGNORE_INDEX, "the last real token predicts nothing"


def test_padding_on_the_right_is_taken_and_its_mask_left_out() -> None:
    features = rows(20, 2)
    mask = torch.ones(20, dtype=torch.long)
    mask[15:] = 0
    features[0] = {**features[0], "labels": features[0]["labels"].masked_fill(mask == 0, IGNORE_INDEX)}
    for dtype in (torch.long, torch.bool, torch.float):
        masked = [{**row, "attention_mask": m.to(dtype)} for row, m in zip(features, (mask, mask**0), strict=True)]
        check_parts(features, 2, partial(cut, masked, 2))


def _positions(*starts_and_stops: tuple[int, int]) -> Tensor:
    return torch.cat([torch.arange(*pair) for pair in starts_and_stops])


LEFT = torch.tensor([0] * 4 + [1] * 16)
HOLE = torch.tensor([1] * 10 + [0] * 2 + [1] * 8)
RIGHT = torch.tensor([1] * 16 + [0] * 4)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "left padding": ({"attention_mask": LEFT}, ValueError, "padding_side='right'"),
    "a hole in the mask": ({"attention_mask": HOLE}, ValueError, "on the right"),
    "a 4-D mask": ({"attention_mask": torch.ones(1, 20, 20)}, ValueError, "shape .1, 1, 20, 20. .* no other mask"),
    "labels of padding": ({"attention_mask": RIGHT}, ValueError, "labels of padding to -100"),
    "next tokens of padding": (
        {"attention_mask": RIGHT, "shift_labels": torch.arange(20)},
        ValueError,
        "labels of padding to -100",
    ),
    "packed documents under a mask": (
        {"position_ids": _positions((0, 8), (0, 12)), "attention_mask": LEFT**0},
        NotImplementedError,
        "attention_mask beside packed documents",
    ),
    "marks that disagree": (
        {"position_ids": _positions((0, 8), (0, 12)), "seq_idx": torch.arange(20) // 10},
        ValueError,
        "disagrees",
    ),
    "positions from 1": ({"position_ids": torch.arange(1, 21)}, NotImplementedError, "from 1 to 20 .* count from 0"),
    "embeddings": ({"inputs_embeds": torch.ones(20, 4)}, NotImplementedError, "inputs_embeds"),
    "labels of another length": ({"labels": torch.arange(21)}, ValueError, "labels of shape"),
    "shifted labels of another length": ({"shift_labels": torch.arange(19)}, ValueError, "shift_labels of shape"),
    "ids of no batch": ({"input_ids": torch.tensor(1)}, ValueError, "input_ids of shape"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("sp", [1, 2])
def test_what_cannot_be_cut_is_refused(case: str, sp: int) -> None:
    more, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        cut([{**rows(20)[0], **more}], sp, 0)


def packed(lengths: tuple[int, ...], marks: str) -> list[Batch]:
    """One row whose collator marks documents in one of the ways there are; every first token has a label."""
    (row,) = rows(sum(lengths))
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    by_name: dict[str, Batch] = {
        "position_ids": {"position_ids": torch.arange(edges[-1]) - torch.tensor(edges)[owner]},
        "seq_idx": {"seq_idx": owner.int()},
        "cu_seq_lens_q": {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": max(lengths)},
    }
    return [{**row, **by_name[marks]}]


def of_one_row(features: list[Batch]) -> Batch:
    by_token = {name: value[None] for name, value in features[0].items() if isinstance(value, Tensor)}
    edges = {name: torch.tensor(value) for name, value in features[0].items() if isinstance(value, list)}
    return {**features[0], **by_token, **edges}


def check_packed(lengths: tuple[int, ...], sp: int, cut_of: Callable[[int], Batch]) -> None:
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    whole, missing = rows(edges[-1])[0], -edges[-1] % sp
    following = pad(whole["labels"], (0, missing + 1), value=IGNORE_INDEX)[1:]
    following[torch.tensor(edges[1:]) - 1] = IGNORE_INDEX
    edges += [edges[-1] + missing] if missing else []
    places = torch.cat([torch.arange(stop - start) for start, stop in zip(edges, edges[1:], strict=False)])
    for rank in range(sp):
        part, own = cut_of(rank), own_tokens(sum(lengths), sp, rank)
        assert part["cu_seq_lens_q"].tolist() == edges and part["cu_seq_lens_q"].dtype == torch.int32
        assert torch.equal(part["position_ids"][0], places[own])
        assert torch.equal(part["labels"][0], following[own]) and torch.equal(part["shift_labels"], part["labels"])
        names = {"input_ids", "position_ids", "labels", "shift_labels", "fpdt_sample", "cu_seq_lens_q"}
        assert set(part) == names | ({"fpdt_padding"} if missing else set())


@pytest.mark.parametrize("marks", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("sp", [1, 2, 3])
def test_boundaries_are_found_before_the_cut(sp: int, marks: str) -> None:
    for lengths in ((8, 12), (1, 1, 30, 5), (12, 24, 12), (1,) * 7):
        features = packed(lengths, marks)
        check_packed(lengths, sp, lambda rank, f=features: ShardingCollator(of_one_row, sp, rank, CHUNK, PAD)(f))  # type: ignore[misc]

    def after(rank: int) -> Batch:
        part = ShardingCollator(of_one_row, sp, rank, CHUNK, PAD)(packed((8, 12), marks))
        return {**part, "cu_seq_lens_q": part["cu_seq_lens_q"] + 1}

    wrong = {"boundaries off by one": after, "none": lambda rank: cut(rows(20), sp, rank) | {"cu_seq_lens_q": LEFT}}
    assert_rejects(lambda variant: check_packed((8, 12), sp, variant), wrong)


def test_documents_in_several_rows_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="a batch of 2 rows"):
        cut(rows(20, 2, position_ids=_positions((0, 8), (0, 12))), 2, 0)


def test_missing_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="must give input_ids of shape .batch, tokens.; got none"):
        cut([{"labels": torch.arange(4)}], 2, 0)
    with pytest.raises(ValueError, match="got list"):
        ShardingCollator(lambda features: {"input_ids": [[1, 2]]}, 2, 0, CHUNK)([{}])


def test_labels_that_are_shifted_already_are_only_cut() -> None:
    """A padding-free collator gives `shift_labels` of its own, with or without `labels`."""
    (row,) = rows(13)
    shifted = pad(row["labels"], (0, 1), value=IGNORE_INDEX)[1:]
    shifted[4] = 5  # which no shift of `labels` would give
    following = pad(shifted, (0, 1), value=IGNORE_INDEX)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": row["labels"]}):
        for rank in range(2):
            part = cut([{"input_ids": row["input_ids"], **given}], 2, rank)
            assert torch.equal(part["shift_labels"][0], following[own_tokens(13, 2, rank)])
            assert torch.equal(part["labels"], part["shift_labels"])


def test_padding_is_told_to_every_rank_where_any_has_some() -> None:
    ids, mask = torch.arange(13), (torch.arange(13) < 9).long()
    cuts = [cut([{"input_ids": ids, "attention_mask": mask}], 2, rank) for rank in range(2)]
    for rank, part in enumerate(cuts):
        assert part["fpdt_padding"].tolist() == [(own_tokens(13, 2, rank) >= 9).tolist()]
    assert "fpdt_padding" not in cut([{"input_ids": ids[:12], "attention_mask": torch.ones_like(ids[:12])}], 2, 0)
    filled = cut([{"input_ids": ids}], 2, 1)["fpdt_padding"]
    assert filled.sum() == 1 and bool(filled[0, -1])


def test_no_rank_is_left_a_single_token_of_the_last_chunk_where_that_matters() -> None:
    ids = {"input_ids": torch.arange(2 * CHUNK + 1)}
    parts = [ShardingCollator(stacked, 2, 1, CHUNK, two_each=each)([ids]) for each in (False, True)]
    assert [part["input_ids"].shape[1] for part in parts] == [CHUNK + 1, CHUNK + 2]


def test_a_batch_without_labels_stays_without() -> None:
    part = cut([{"input_ids": torch.arange(10)}], 2, 1)
    assert set(part) == {"input_ids", "position_ids", "fpdt_sample"}


def test_other_tensors_with_a_token_axis_are_cut_and_the_rest_passes() -> None:
    features = rows(13, 2, token_type_ids=torch.arange(13), weights=torch.arange(26.0).view(13, 2))

    def collate(features: list[Batch]) -> Batch:
        return {**stacked(features), "task": torch.tensor([3, 4]), "names": ["a", "b"], "flag": True, "temperature": 1}

    for rank in range(2):
        part = ShardingCollator(collate, 2, rank, CHUNK)(features)
        own = own_tokens(13, 2, rank)
        assert torch.equal(part["token_type_ids"], pad(features[0]["token_type_ids"], (0, 1))[own].expand(2, -1))
        weights = torch.cat([features[0]["weights"], torch.zeros(1, 2)])
        assert torch.equal(part["weights"], weights[own].expand(2, -1, -1))
        assert part["task"].tolist() == [3, 4] and part["names"] == ["a", "b"]
        assert part["flag"] is True and part["temperature"] == 1


def test_the_features_and_the_inner_batch_are_left_as_they_were() -> None:
    batch = stacked(rows(13))
    before = {name: value.clone() for name, value in batch.items()}
    ShardingCollator(lambda _: batch, 2, 0, CHUNK)([])
    assert batch.keys() == before.keys() and all(torch.equal(batch[name], before[name]) for name in before)


def test_workers_take_it_through_a_pickle() -> None:
    collator = ShardingCollator(stacked, 2, 1, CHUNK, PAD)
    assert pickle.loads(pickle.dumps(collator)) == collator
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn", "batch_size": 2}
    parts = list(DataLoader(rows(17, 4), collate_fn=collator, **options))  # type: ignore[arg-type]
    for index, part in enumerate(parts):
        here = cut(rows(17, 4)[2 * index : 2 * index + 2], 2, 1)
        assert part.keys() == here.keys() and all(torch.equal(part[name], here[name]) for name in here)
    assert len(parts) == 2


def test_a_million_tokens_take_less_than_a_second() -> None:
    features = rows(2**20)
    start = time.process_time()  # of this process: others may be at work on the same cores
    part = cut(features, 4, 3, chunk=32_768)
    assert time.process_time() - start < 1
    assert part["input_ids"].shape == (1, 2**18)
