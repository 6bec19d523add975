"""Sequence parallelism: many gloo processes against one, loss and every gradient."""

from __future__ import annotations

import copy
import faulthandler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt
from hf_fpdt.parallel.group import SequenceParallelGroup, build_group, repeat_heads, sum_repeated_heads
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.helpers.truth import in_double, tiny

CHUNK = 16
WORLDS = [(1, 2), (2, 1), (2, 2), (4, 1)]  # (sequence-parallel, data-parallel)


def sample(index: int, n_tokens: int) -> dict[str, Tensor]:
    """Ids of one sequence with labels of which some do not count; the same in every process."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 97, (n_tokens,), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) < 0.2
    ignored[1] = False  # the only label of a sequence of two tokens
    labels = ids.masked_fill(ignored, -100)
    return {"input_ids": ids, "labels": labels}


def stacked(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}


def model_of(case: str) -> PreTrainedModel:
    """A float64 model: "llama-G" with G key/value heads of 4, "neox", with "+lora" a PEFT model around it."""
    name, _, lora = case.partition("+")
    kv_heads = {"num_key_value_heads": int(name[-1])} if name.startswith("llama") else {}
    model = in_double(tiny(name.split("-")[0] if kv_heads else name, **kv_heads))
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
    return {name: _whole(grad) for name, grad in named if grad is not None}


def _whole(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def expected(case: str, n_tokens: int, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over samples of each sample's loss, on one process with the plain model."""
    model = model_of(case)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    losses = []
    for index in range(samples):
        loss = model(**stacked([sample(index, n_tokens)])).loss
        (loss / samples).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), gradients(model)


def check_against(case: str, n_tokens: int, dp: int, model: nn.Module, loss: Tensor) -> None:
    """Same loss (mean over ranks) and, DDP or FSDP having averaged them, the same gradients."""
    exact_loss, exact = expected(case, n_tokens, dp)
    mean = loss.detach().clone()
    dist.all_reduce(mean, op=dist.ReduceOp.SUM)
    assert relative_error(mean / dist.get_world_size(), exact_loss) < 1e-12
    ours = gradients(model)
    assert ours.keys() == exact.keys()
    for name, grad in exact.items():
        error = float((ours[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-6)
        assert error < 1e-10, f"{name}: {error:.1e}"


def own_batch(sp: int, rank: int, n_tokens: int, index: int = 0) -> dict[str, Tensor]:
    collator = ShardingCollator(stacked, sp, rank % sp, CHUNK)
    return collator([sample(rank // sp + index, n_tokens)])


def _ddp_steps(rank: int, world: int, runs: list[tuple[str, int, int, dict[str, Any]]]) -> None:
    for case, sp, n_tokens, options in runs:
        model = model_of(case)
        apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, **options))
        wrapped = DistributedDataParallel(model)
        loss = wrapped(**own_batch(sp, rank, n_tokens)).loss
        loss.backward()
        check_against(case, n_tokens, world // sp, wrapped, loss)


@pytest.mark.parametrize(("sp", "dp"), WORLDS)
def test_ddp_gradients_equal_one_process(sp: int, dp: int) -> None:
    spawn(_ddp_steps, sp * dp, [(case, sp, 63, {}) for case in ("llama-2", "neox+lora")])


@pytest.mark.parametrize("checkpoints", ["attention", "input"])
def test_heads_and_policies_equal_one_process(checkpoints: str) -> None:
    """Key/value heads fewer than ranks are repeated and their gradients summed."""
    cases = ("llama-1", "llama-4", "llama-2+lora", "neox", "neox-sequential")
    spawn(_ddp_steps, 4, [(case, 4, 40, {"checkpoints": checkpoints}) for case in cases])


def test_odd_lengths_equal_one_process() -> None:
    """Padded to a multiple of the ranks, shorter than a chunk, one token a rank."""
    spawn(_ddp_steps, 2, [("llama-2", 2, n_tokens, {}) for n_tokens in (2, 3, 13, 64, 65)])


def _collator_bug(rank: int, world: int, bug: str) -> None:
    model = model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    batch = own_batch(2, rank, 63)
    if bug == "labels shifted after the cut":
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    elif bug == "labels of another rank":
        batch["shift_labels"] = batch["labels"] = own_batch(2, 1 - rank, 63, rank * 2 - 1)["labels"]
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**batch).loss
    loss.backward()
    check_against("llama-2", 63, 1, wrapped, loss)


def test_the_check_rejects_broken_cuts() -> None:
    bugs = ["labels shifted after the cut", "labels of another rank"]
    assert_rejects(lambda bug: spawn(_collator_bug, 2, bug), {bug: bug for bug in bugs})


def _misplaced(rank: int, world: int) -> None:
    """Every rank raises, so none waits for another; the group works on afterwards."""
    model = model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    whole = ShardingCollator(stacked, 1, 0, CHUNK)([sample(0, 64)])
    halves = {name: value if value.dim() < 2 else value.chunk(2, 1)[rank] for name, value in whole.items()}
    good = own_batch(2, rank, 63)
    same_lengths = ShardingCollator(stacked, 2, rank, CHUNK)([sample(rank, 63)])
    other_lengths = ShardingCollator(stacked, 2, rank, CHUNK)([sample(0, 63 + 8 * rank)])
    two_rows = ShardingCollator(stacked, 2, rank, CHUNK)([sample(0, 63)] * (1 + rank))
    misplaced = {
        "contiguous halves": halves,
        "positions from 0 on every rank": {**good, "position_ids": torch.arange(32)[None]},
        "every rank is rank 0": ShardingCollator(stacked, 2, 0, CHUNK)([sample(0, 63)]),
        "another chunk size": ShardingCollator(stacked, 2, rank, 2 * CHUNK)([sample(0, 63)]),
        "one rank alone is wrong": {**good, "position_ids": good["position_ids"] + rank},
    }
    mixed = {"other samples": same_lengths, "other lengths": other_lengths, "other rows": two_rows}
    for batches, message in ((misplaced, "position_ids are not those"), (mixed, "got different samples")):
        for name, batch in batches.items():
            with pytest.raises(ValueError, match=message):
                raise_unless_refused(model, batch, name)
    assert not model(**good).loss.isnan()


def raise_unless_refused(model: nn.Module, batch: dict[str, Tensor], name: str) -> None:
    model(**batch)
    raise AssertionError(f"{name} was not refused")


def test_parts_out_of_place_or_of_different_samples_are_refused_on_every_rank() -> None:
    spawn(_misplaced, 2)


def _accumulated(rank: int, world: int, find_unused: bool) -> None:
    """Two micro-batches, the first under no_sync: hooks fire once a step and the sums are right."""
    model = model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    fired: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.update({name: fired.get(name, 0) + 1}))
    with wrapped.no_sync():
        (wrapped(**own_batch(2, rank, 40, 0)).loss / 2).backward()
    loss = wrapped(**own_batch(2, rank, 40, 1)).loss / 2
    loss.backward()
    assert set(fired.values()) == {2}
    _, exact = expected("llama-2", 40, 2)
    for name, grad in gradients(wrapped).items():
        assert relative_error(grad, exact[name]) < 1e-9, name


@pytest.mark.parametrize("find_unused", [True, False])
def test_gradient_accumulation_under_ddp(find_unused: bool) -> None:
    spawn(_accumulated, 2, find_unused)


def _fsdp_steps(rank: int, world: int, runs: list[tuple[str, int, bool]], hybrid: bool = False) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")) if hybrid else None
    for case, sp, reshard in runs:
        model = model_of(case)
        apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10))
        shard(model, reshard, mesh)
        for _ in range(2):  # the second step starts from resharded weights
            model.zero_grad()
            loss = model(**own_batch(sp, rank, 63)).loss
            loss.backward()
            check_against(case, 63, world // sp, model, loss)


def shard(model: PreTrainedModel, reshard: bool, mesh: DeviceMesh | None) -> None:
    """FSDP2 as accelerate lays it: a unit a layer, one for the final norm and the head, and the root."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    final_norm = next(m for m in decoder.children() if "norm" in type(m).__name__.lower())
    fully_shard([final_norm, base.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_gradients_equal_one_process(reshard: bool) -> None:
    spawn(_fsdp_steps, 2, [(case, sp, reshard) for case, sp in (("llama-2", 2), ("neox+lora", 2), ("llama-2", 1))])


def test_hybrid_sharding_equals_one_process() -> None:
    """Weights sharded over two ranks and replicated over two, sequences shared by two, and by all four."""
    spawn(_fsdp_steps, 4, [("llama-2", 2, True), ("llama-2", 4, True)], True)


def _round_trip(rank: int, world: int) -> None:
    group = build_group(world)
    shapes = [(2, 6, 8, 5), (2, 6, 4, 5), (2, 6, 4, 5)]
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for shape in shapes]
    heads = group.seq_to_heads(*parts)
    assert [x.shape for x in heads] == [(2, 6 * world, n // world, 5) for n in (8, 4, 4)]
    for part, back in zip(parts, group.heads_to_seq(*heads), strict=True):
        assert torch.equal(part, back)
    latent = [torch.randn(2, 6, 8, width, generator=torch.Generator().manual_seed(rank)) for width in (12, 12, 8)]
    for part, back in zip(latent, group.heads_to_seq(*group.seq_to_heads(*latent)), strict=True):
        assert torch.equal(part, back), "values of another width than keys"
    # Rank 0's first piece stands first in every rank's chunk, for that rank's heads.
    first = torch.randn(shapes[0], generator=torch.Generator().manual_seed(0))
    n = 8 // world
    assert torch.equal(heads[0][:, :6], first[:, :, rank * n : (rank + 1) * n])


@pytest.mark.parametrize("world", [2, 4])
def test_exchanges_are_inverse_and_in_order(world: int) -> None:
    spawn(_round_trip, world)


def _all_ignored(rank: int, world: int) -> None:
    model = model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    batch = own_batch(2, rank, 20)
    batch["labels"] = batch["shift_labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss.isnan()


def test_no_label_at_all_gives_nan_on_every_rank_as_on_one_process() -> None:
    spawn(_all_ignored, 2)


def _one_token(rank: int, world: int) -> None:
    """Nothing follows the one token, so there is no label: NaN as on one process, and NaN gradients, but no hang."""
    model = model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    first = {name: value[:1] for name, value in sample(0, 4).items()}
    batch = ShardingCollator(stacked, 2, rank, CHUNK)([first])
    loss = model(**batch).loss
    loss.backward()
    assert loss.isnan() and batch["input_ids"].shape == (1, 1)
    counted = model(**batch, num_items_in_batch=torch.tensor(5)).loss  # beside other samples, in a Trainer's step
    assert counted == 0


def test_a_sample_of_one_token_has_no_loss_on_every_rank() -> None:
    spawn(_one_token, 2)


def _generates(rank: int, world: int) -> None:
    """In generation every rank has the whole of a sequence: samples may be drawn between two steps."""
    stock, model = model_of("llama-2"), model_of("llama-2")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    prompt = sample(rank, 21)["input_ids"][None]
    for mode in (True, False):
        stock.train(mode), model.train(mode)
        drawn = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        exact = stock.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert torch.equal(drawn, exact)
    assert not model(**own_batch(2, rank, 20)).loss.isnan()


def test_ranks_generate_by_themselves() -> None:
    spawn(_generates, 2)


def _refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="does not divide the model's 4 query heads.*take one of 1, 2, 4"):
        apply_fpdt(tiny("llama"), FPDTPlugin(sp_size=3, chunk_tokens=24), SequenceParallelGroup(3))
    with pytest.raises(ValueError, match="sp_size=2 does not divide the 3 processes"):
        build_group(2)


def test_sizes_that_do_not_divide_are_refused() -> None:
    spawn(_refused, 3)


def _ends(rank: int, world: int, folder: str) -> None:
    """DDP's reducer outlives the group right after a collective, of which gloo's thread may still let go."""
    dist.barrier()  # the other rank has joined too
    dist.destroy_process_group()
    faulthandler.dump_traceback_later(40, exit=True)
    for job in range(30):
        store = dist.FileStore(f"{folder}/{job}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        build_group(world)  # without it this hangs within a few jobs
        wrapped = DistributedDataParallel(nn.Linear(2, 2))
        dist.all_reduce(torch.ones(4))
        dist.destroy_process_group()
        del wrapped
    faulthandler.cancel_dump_traceback_later()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/last", world), rank=rank, world_size=world)


def test_a_job_ends_though_its_reducer_lives_longer(tmp_path: Path) -> None:
    spawn(_ends, 2, str(tmp_path))


def test_more_ranks_than_processes_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match="--multi_gpu --num_processes 2 SCRIPT or torchrun.* --cpu starts one process"
    ):
        apply_fpdt(tiny("llama"), FPDTPlugin(sp_size=2, chunk_tokens=16))


@pytest.mark.parametrize("missing", ["position_ids", "shift_labels"])
def test_a_batch_that_was_not_cut_is_refused(missing: str) -> None:
    model = tiny("llama")
    apply_fpdt(model, FPDTPlugin(sp_size=2, chunk_tokens=16), SequenceParallelGroup(2))
    batch = ShardingCollator(stacked, 2, 0, CHUNK)([sample(0, 40)])
    del batch[missing]
    with pytest.raises(ValueError, match=missing):
        model(**batch)


def test_repeated_heads_sum_their_gradients() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    (exact,) = torch.autograd.grad(repeat_heads(x, 3), x, dy)
    assert relative_error(sum_repeated_heads(dy, 3), exact) < 1e-15
    assert_rejects(lambda g: _close(g, exact), {"mean": sum_repeated_heads(dy, 3) / 3})


def _close(a: Tensor, b: Tensor) -> None:
    assert relative_error(a, b) < 1e-12


def test_a_group_is_shared_by_copies_and_left_out_of_pickles() -> None:
    import pickle

    group = SequenceParallelGroup(2, 1, object())
    assert copy.deepcopy(group) is group
    assert pickle.loads(pickle.dumps(group)) == SequenceParallelGroup(2, 1)
