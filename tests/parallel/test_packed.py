"""Packed rows on several ranks: many gloo processes against one document at a time on a plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithFlattening

import hf_fpdt.engine.recurrent
import hf_fpdt.model.layers
from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt
from hf_fpdt.layout.documents import Documents
from hf_fpdt.parallel.packed_scans import ChunkDocuments
from hf_fpdt.parallel.rows import JoinedRows
from tests.helpers.kinds import FAMILIES, TOLERANCE, in_double, kind
from tests.helpers.models import tiny
from tests.helpers.packed import moved, random_lengths
from tests.helpers.recurrent import FAMILIES as RECURRENT
from tests.helpers.recurrent import recurrent
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.parallel.test_sequence_parallel import CHUNK, gradients, sample, shard, stacked

Run = tuple[str, int, tuple[int, ...], dict[str, Any]]  # family, sp_size, lengths, what else the plugin is given
HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 1}
# Ending on borders of chunks of 16, longer than several, of length 1, no multiple of the ranks.
# Documents that begin just before the border of a chunk, of a rank's part of one, and at such borders.
BORDERS = (7, 8, 1, 13, 3, 20, 4, 7)
ROWS = ((16, 40, 1, 7), (32, 32), (1, 1, 1, 60), (63,), random_lengths(3, 61))


def model_of(name: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 97, "tie_word_embeddings": False}
    if name in RECURRENT:
        return recurrent(name, **sizes | ({"linear_num_heads": 4} if name == "kimi_linear" else {}))
    return kind(name, **sizes) if name in FAMILIES else tiny(name, attention="eager", **sizes)


def features(lengths: tuple[int, ...], index: int) -> list[dict[str, list[int]]]:
    """Documents with labels of which some do not count, that of the first token among those that do."""
    whole = sample(index, sum(lengths))
    parts = [whole[name].split(list(lengths)) for name in ("input_ids", "labels")]
    return [{"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(*parts, strict=True)]


def own_batch(sp: int, rank: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    collator = ShardingCollator(DataCollatorWithFlattening(return_seq_idx=True), sp, rank % sp, CHUNK)
    return collator(features(lengths, rank // sp))


def check(name: str, lengths: tuple[int, ...], samples: int, model: nn.Module, loss: Tensor) -> None:
    """Loss (mean over ranks) and gradients, averaged by DDP or FSDP2, are those of the documents one at a time."""
    plain, losses = model_of(name), []
    for index in range(samples):
        documents = [{key: torch.tensor([value]) for key, value in each.items()} for each in features(lengths, index)]
        kept = sum(int((each["labels"][:, 1:] != -100).sum()) for each in documents)
        sums = [plain(**each, num_items_in_batch=kept).loss for each in documents if each["labels"].shape[1] > 1]
        losses.append(torch.stack(sums).sum())
    exact_loss = torch.stack(losses).mean()
    exact_loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert relative_error(mean / dist.get_world_size(), exact_loss.detach()) < TOLERANCE, f"{name}, {lengths}: loss"
    ours, exact = gradients(model), gradients(plain)
    assert ours.keys() == exact.keys()
    floor = 1e-3 * max(float(grad.abs().max()) for grad in exact.values())
    for key, grad in exact.items():
        error = float((ours[key] - grad).abs().max()) / max(float(grad.abs().max()), floor)
        assert error < TOLERANCE, f"{name}, {lengths}: {key}: {error:.1e}"


def applied(name: str, sp: int, **options: Any) -> Any:
    model = model_of(name)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10, **options))
    return model


def _ddp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for name, sp, lengths, options in runs:
            wrapped = DistributedDataParallel(applied(name, sp, **options))
            loss = wrapped(**own_batch(sp, rank, lengths)).loss
            loss.backward()
            check(name, lengths, world // sp, wrapped, loss)
            with torch.no_grad():
                evaluated = wrapped.eval()(**own_batch(sp, rank, lengths)).loss
            assert relative_error(evaluated, loss.detach()) < TOLERANCE, f"{name}, {lengths}: in evaluation"


def test_two_ranks_equal_documents_one_at_a_time() -> None:
    runs: list[Run] = [("llama", 2, lengths, {}) for lengths in ROWS[2:]]
    runs += [("gpt_oss", 2, ROWS[4], {"checkpoints": "segment", **HOST}), ("llama4_text", 2, ROWS[4], {})]
    runs += [(name, 2, ROWS[0], {}) for name in ("kimi_linear", "falcon_h1", "lfm2")]
    runs += [("qwen3_5_text", 2, BORDERS, {}), ("bamba", 2, BORDERS, {"checkpoints": "segment", **HOST})]
    spawn(_ddp, 2, runs)


def test_four_ranks_equal_documents_one_at_a_time() -> None:
    runs: list[Run] = [("gpt_oss", 4, ROWS[4], HOST), ("qwen3_5_text", 4, BORDERS, {"checkpoints": "input", **HOST})]
    runs += [("falcon_h1", 4, BORDERS, {}), ("nemotron_h", 2, ROWS[0], {})]
    spawn(_ddp, 4, runs)


def _fsdp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for name, sp, lengths, options in runs:
            model = applied(name, sp, **options)
            shard(model, True, None)
            for _ in range(2):  # the second step starts from resharded weights
                model.zero_grad()
                loss = model(**own_batch(sp, rank, lengths)).loss
                loss.backward()
                check(name, lengths, world // sp, model, loss)


def test_fsdp2_equals_documents_one_at_a_time() -> None:
    rebuilt = {"checkpoints": "segment", **HOST}
    spawn(_fsdp, 2, [("gpt_oss", 1, ROWS[0], {}), ("qwen3_5_text", 2, ROWS[1], rebuilt)])


def _broken(rank: int, world: int) -> None:
    for name, lengths, bugs in (("llama", ROWS[0], BUGS), ("qwen3_5_text", BORDERS, LEAKS)):
        with in_double():
            wrapped = DistributedDataParallel(applied(name, 2))
            wrapped(**own_batch(2, rank, lengths))  # layers are tried before they are broken

            def checked(bug: str, name: str = name, lengths: Any = lengths, wrapped: nn.Module = wrapped) -> None:
                wrapped.zero_grad()
                batch = own_batch(2, rank, lengths)
                with pytest.MonkeyPatch.context() as patch:
                    if bug == "boundaries of a rank's own":
                        local = moved(Documents.of_lengths(lengths), -1 - rank)
                        patch.setattr(hf_fpdt.model.layers, "documents_of_batch", lambda: local)
                    if bug == "labels across boundaries":
                        flat = [{"input_ids": sum((each["input_ids"] for each in features(lengths, 0)), [])}]
                        across = ShardingCollator(DataCollatorWithFlattening(), 2, rank, CHUNK)(flat)
                        batch |= {"labels": across["labels"], "shift_labels": across["labels"]}
                    if bug in LEAKS:
                        patch.setattr(*LEAKS[bug])
                    loss = wrapped(**batch).loss
                    loss.backward()
                check(name, lengths, 1, wrapped, loss)

            checked("none")
            assert_rejects(checked, {bug: bug for bug in bugs})


def _right_within(self: ChunkDocuments, inputs: Tensor, *, before_own: bool) -> Tensor:
    return inputs if before_own else _without_others(self, inputs, before_own=False)


_without_others = ChunkDocuments.without_others
BUGS = ("boundaries of a rank's own", "labels across boundaries")
LEAKS: dict[str, tuple[Any, str, Any]] = {
    "inputs of another document, from the rank on the left": (ChunkDocuments, "without_others", _right_within),
    "states of another document": (ChunkDocuments, "goes_on", property(lambda self: self.chunk.start > 0)),
    "convolutions over boundaries": (hf_fpdt.engine.recurrent, "convolution_of_documents", lambda each, part: each),
}


def test_the_check_rejects_broken_ranks() -> None:
    spawn(_broken, 2)


def _disagree(rank: int, world: int) -> None:
    """Every rank raises, so none waits for another."""
    model = applied("llama", 2)
    batch = own_batch(2, rank, ((8, 55), (7, 56))[rank])
    with pytest.raises(ValueError, match="got different samples|position_ids are not those of a rank's part"):
        model(**batch)
    batch = own_batch(2, rank, (8, 55))
    with pytest.raises(ValueError, match="position_ids are not those of a rank's part"):
        model(**batch | {"cu_seq_lens_q": torch.tensor([0, 9, 63, 64])})


def test_ranks_with_other_boundaries_raise_on_all_of_them() -> None:
    spawn(_disagree, 2)


# -- rows of several lengths ------------------------------------------------------------------------------------------


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """A batch of rows with padding on the right, and labels of which some do not count."""
    length = max(lengths)
    batch = stacked([sample(index, length) for index in range(len(lengths))])
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": batch["input_ids"] * mask, "attention_mask": mask} | {
        "labels": batch["labels"].masked_fill(mask == 0, -100)
    }


def check_padded(rank: int, name: str, joins: Any) -> None:
    """Loss and gradients of a padded batch on two ranks are a plain model's, and no padding is computed."""
    batch, sizes = padded((40, 9, 21)), list[int]()
    plain = model_of(name)
    plain(**batch).loss.backward()
    wrapped = DistributedDataParallel(applied(name, 2))
    wrapped.module.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    own = ShardingCollator(joins(lambda features: features[0]), 2, rank, CHUNK)([batch])
    wrapped(**own).loss.backward()
    ours, exact = gradients(wrapped), gradients(plain)
    for key, grad in exact.items():
        assert relative_error(ours[key], grad) < TOLERANCE, f"{name}: {key}"
    assert set(sizes) == {(40 + 9 + 21) // 2}, "padding goes through the layers"


def without_edges(inner: Any) -> Any:
    """Rows that are put together, and take one another for one document."""
    joined = JoinedRows(inner)
    return lambda features: {name: value for name, value in joined(features).items() if name != "cu_seq_lens_q"}


def _padded(rank: int, world: int) -> None:
    with in_double():
        for name in ("gpt_oss", "qwen3_5_text"):
            check_padded(rank, name, JoinedRows)
        broken = {"one document": without_edges, "padding is computed": lambda inner: inner}
        assert_rejects(lambda joins: check_padded(rank, "llama", joins), broken)


def test_padding_goes_through_no_layer_of_two_ranks() -> None:
    spawn(_padded, 2)


def test_what_cannot_be_joined_stays_as_it_is() -> None:
    batch, same = padded((5, 9)), padded((9, 9))
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    for other in (
        same,
        left,
        {**batch, "position_ids": torch.arange(9)[None]},
        {**batch, "pixel_values": torch.zeros(2, 3)},
        {**batch, "shift_labels": batch["labels"].clone()},
        {"input_ids": batch["input_ids"]},
        padded((4,)),
    ):
        found = JoinedRows(dict)(other)
        assert found.keys() == other.keys() and all(found[name] is other[name] for name in other)
    joined = JoinedRows(dict)({**batch, "numbers": torch.arange(3), "by_token": torch.arange(36).view(2, 9, 2)})
    assert joined["cu_seq_lens_q"].tolist() == [0, 5, 14] and "attention_mask" not in joined
    assert joined["by_token"].shape == (1, 14, 2) and torch.equal(joined["numbers"], torch.arange(3))
    assert joined["input_ids"][0].tolist() == batch["input_ids"][0, :5].tolist() + batch["input_ids"][1].tolist()
    with pytest.raises(ValueError, match="JoinedRows: attention_mask marks tokens as padding whose labels count"):
        JoinedRows(dict)({**batch, "labels": batch["input_ids"]})
