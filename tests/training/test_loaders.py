"""Loaders that FPDTAccelerator prepares: the ranks of a group read the same samples, and each gets its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler
from transformers import TrainingArguments

from hf_fpdt import FPDTTrainer, ShardingCollator
from hf_fpdt.model.apply import applied_settings
from tests.helpers.recurrent import recurrent
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.parallel.test_sequence_parallel import CHUNK, model_of, sample, stacked
from tests.training.test_accelerator import Samples, accelerator, plugin, without_number


def everyones(values: list[int]) -> list[list[int]]:
    lists: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return lists


def assert_grouped(by_rank: list[list[int]], sp: int, count: int) -> None:
    """The ranks of a group read the same samples, groups read others, and together they read all."""
    groups = [by_rank[start : start + sp] for start in range(0, len(by_rank), sp)]
    for group in groups:
        assert all(numbers == group[0] for numbers in group)
    assert sorted(number for group in groups for number in group[0]) == list(range(count))


def _shuffled(rank: int, world: int, sp: int) -> None:
    runner = accelerator(sp)
    set_seed(10 + rank)
    caller = DataLoader(Samples(8), batch_size=1, shuffle=True, collate_fn=stacked)
    loader = runner.prepare(caller)
    assert caller.collate_fn is stacked and not isinstance(caller.collate_fn, ShardingCollator)
    assert runner.dataloader_config.data_seed is None

    def epoch(number: int, loader: Any = loader) -> list[list[int]]:
        torch.rand(rank)  # the ranks draw different amounts in between
        loader.set_epoch(number)
        return everyones([int(batch["number"]) for batch in loader])

    orders = [epoch(number) for number in range(3)]
    for order in orders:
        assert_grouped(order, sp, 8)
    assert orders[0] != orders[1] != orders[2]
    assert epoch(1) == orders[1]
    skipped = skip_first_batches(loader, 2)
    assert epoch(1, skipped) == [numbers[2:] for numbers in orders[1]]
    parts = [batch["position_ids"] for batch in skipped]
    assert all(part.shape == (1, 40 // sp) for part in parts), "skipping keeps the cut"
    broken = {"ranks by themselves": [[0, 1, 2, 3, 4, 5, 6, 7][rank:] for rank in range(world)]}
    broken["groups alike"] = [orders[0][0]] * world if world > sp else [orders[0][0][:-1]] * world
    assert_rejects(lambda order: assert_grouped(order, sp, 8), broken)


@pytest.mark.parametrize(("sp", "dp"), [(2, 1), (2, 2)])
def test_ranks_of_a_group_read_the_same_samples_whatever_their_seeds(sp: int, dp: int) -> None:
    spawn(_shuffled, sp * dp, sp)


def _other_samplers(rank: int, world: int) -> None:
    runner = accelerator(2)
    set_seed(rank)
    sampler = WeightedRandomSampler([1.0] * 20, 12)
    plain = DataLoader(Samples(20), sampler=sampler, collate_fn=stacked)
    batched = DataLoader(Samples(20), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 20, 12), 1, False))
    for loader in (runner.prepare(plain), runner.prepare(batched)):
        orders = [everyones([int(batch["number"]) for batch in loader]) for _ in range(2)]
        assert all(first == second and len(first) == 12 for first, second in orders)
        assert orders[0] != orders[1]


def test_samplers_that_draw_draw_alike_in_a_group() -> None:
    spawn(_other_samplers, 2)


def _batches_that_are_batched_already(rank: int, world: int) -> None:
    """batch_size=None, and a set that does not divide."""
    runner = accelerator(2)
    whole = [stacked([sample(number, 20), sample(number + 1, 20)]) for number in range(2)]
    loader = runner.prepare(DataLoader(whole, batch_size=None))  # type: ignore[arg-type]
    for number, batch in enumerate(loader):
        own = ShardingCollator(stacked, 2, rank, CHUNK)([sample(number, 20), sample(number + 1, 20)])
        assert all(torch.equal(batch[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="pass the inner collator"):
        runner.prepare(DataLoader(Samples(2), collate_fn=ShardingCollator(stacked, 2, rank, 2 * CHUNK)))
    cut = DataLoader(Samples(2), collate_fn=ShardingCollator(stacked, 2, rank, CHUNK))
    assert next(iter(runner.prepare(cut)))["input_ids"].shape == (1, 20)


def test_batches_made_by_the_caller_are_cut_once() -> None:
    spawn(_batches_that_are_batched_already, 2)


def _no_single_tokens(rank: int, world: int, folder: Path) -> None:
    """Of a chunk and two tokens each rank would have one of the last chunk."""
    data = [sample(0, CHUNK + 2)]
    sizes: dict[str, Any] = {"vocab_size": 97, "tie_word_embeddings": False}
    caller: Any = DataLoader(data, collate_fn=stacked)  # type: ignore[arg-type]
    model, loader = accelerator(2).prepare(recurrent("lfm2", **sizes), caller)
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    trainer = FPDTTrainer(recurrent("lfm2", **sizes), args, stacked, data, fpdt_plugin=plugin(2))
    for batches in (loader, trainer.get_train_dataloader()):
        (batch,) = batches
        assert batch["input_ids"].shape == (1, CHUNK // 2 + 2)
        assert model(**batch).loss.isfinite()


def test_no_rank_has_a_single_token_of_a_recurrent_layers_chunk(tmp_path: Path) -> None:
    spawn(_no_single_tokens, 2, tmp_path)


def test_one_process_keeps_its_loader_and_trains_as_with_apply_fpdt() -> None:
    runner = accelerator()
    model, loader = runner.prepare(model_of("llama-2"), DataLoader(Samples(1), collate_fn=stacked))
    assert loader.collate_fn is stacked and applied_settings(model)
    (batch,) = loader
    loss = model(**without_number(batch)).loss
    assert relative_error(loss, model_of("llama-2")(**stacked([sample(0, 39)])).loss) < 1e-6
