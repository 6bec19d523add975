"""FPDTAccelerator in loops of one's own: gradients, loaders, saved states, FSDP2, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    set_seed,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_fpdt import FPDTAccelerator, FPDTPlugin, apply_fpdt
from hf_fpdt.forecast.collectives import ShardedWeights
from hf_fpdt.model.apply import applied_settings
from hf_fpdt.model.layers import decoder_layers
from hf_fpdt.training.loaders import _refused_options
from tests.helpers.support import assert_rejects, counting_fsdp, relative_error, spawn
from tests.helpers.truth import tiny
from tests.parallel.test_sequence_parallel import CHUNK, check_against, model_of, own_batch, sample, stacked

Batch = dict[str, Tensor]


def plugin(sp: int) -> FPDTPlugin:
    return FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp)


def accelerator(sp: int = 1, **options: Any) -> FPDTAccelerator:
    """A fresh one; Accelerate keeps the state of the last one in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return FPDTAccelerator(cpu=True, fpdt_plugin=plugin(sp), **options)


class Samples(Dataset):
    """Numbered samples of one length."""

    def __init__(self, count: int, n_tokens: int = 39) -> None:
        self.count, self.n_tokens = count, n_tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return {**sample(index, self.n_tokens), "number": torch.tensor(index)}


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, count: int) -> None:
        self.samples = Samples(count)

    def __iter__(self) -> Iterator[Batch]:
        return (self.samples[index] for index in range(self.samples.count))


# -- training ---------------------------------------------------------------------------------------------------------


def without_number(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "number"}


def truth_after(steps: list[list[int]], learning_rate: float = 0.1) -> dict[str, Tensor]:
    """Weights of the plain model, trained on one process by the mean of the losses of each step's samples."""
    model = model_of("llama-2")
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for numbers in steps:
        for number in numbers:
            (model(**stacked([sample(number, 39)])).loss / len(numbers)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_weights(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, weight in truth.items():
        error = relative_error(ours[name], weight)
        assert error < 1e-6, f"{name}: {error:.1e}"


def _own_loop(rank: int, world: int, sp: int, accumulate: int, stream: bool) -> None:
    set_seed(rank)  # a user may give each rank a seed of its own
    runner = accelerator(sp, gradient_accumulation_steps=accumulate)
    model = model_of("llama-2")
    data = Stream(8) if stream else Samples(8)
    loader: Any = DataLoader(data, batch_size=1, collate_fn=stacked)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    wrapped, optimizer, loader, scheduler = runner.prepare(model, optimizer, loader, scheduler)
    dp = world // sp
    numbers = []
    for batch in loader:
        with runner.accumulate(wrapped):
            loss = wrapped(**without_number(batch)).loss
            runner.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        numbers.append(int(batch["number"]))
    assert numbers == list(range(rank // sp, 8, dp))
    steps = [list(range(start, start + dp * accumulate)) for start in range(0, 8, dp * accumulate)]
    truth = truth_after(steps)
    unwrapped = runner.unwrap_model(wrapped)
    assert unwrapped is model and applied_settings(unwrapped)
    ours = dict(unwrapped.named_parameters())
    assert_weights(ours, truth)
    broken = {"a step lost": truth_after(steps[:-1]), "other samples": truth_after([[0]] * len(steps))}
    assert_rejects(lambda weights: assert_weights(ours, weights), broken)


@pytest.mark.parametrize(("sp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_own_loops_train_as_one_process(sp: int, dp: int) -> None:
    spawn(_own_loop, sp * dp, sp, 1, False)


@pytest.mark.parametrize("stream", [False, True])
def test_own_loops_accumulate_as_one_process(stream: bool) -> None:
    spawn(_own_loop, 2, 2, 2, stream)


def test_streams_are_shared_between_groups() -> None:
    spawn(_own_loop, 4, 2, 2, True)


def _prepared_alone(rank: int, world: int) -> None:
    """Models prepared one by one, or with FPDT already, train like those that `prepare` makes."""
    runner = accelerator(2)
    for prepare_first in (True, False):
        model = model_of("llama-2")
        if not prepare_first:
            apply_fpdt(model, plugin(2))
        wrapped = runner.prepare_model(model) if prepare_first else runner.prepare(model)
        loss = wrapped(**own_batch(2, rank, 63)).loss
        loss.backward()
        check_against("llama-2", 63, 1, wrapped, loss)
    assert len(runner.fpdt_handles) == 1
    runner.free_memory()
    assert not runner.fpdt_handles
    other = model_of("llama-2")
    apply_fpdt(other, FPDTPlugin(chunk_tokens=2 * CHUNK, sp_size=2))
    with pytest.raises(ValueError, match="pass the same fpdt_plugin"):
        runner.prepare(other)
    with pytest.raises(NotImplementedError, match=r"accelerator.reduce\(loss, 'mean'\)"):
        runner.gather_for_metrics(torch.zeros(2))


def test_a_model_can_be_prepared_alone() -> None:
    spawn(_prepared_alone, 2)


def _mean_of_losses(rank: int, world: int) -> None:
    """What `gather_for_metrics` is refused in favour of."""
    runner = accelerator(2)
    model, loader = runner.prepare(model_of("llama-2"), DataLoader(Samples(4), batch_size=1, collate_fn=stacked))
    model.eval()
    losses = []
    with torch.no_grad():
        for batch in loader:
            losses.append(runner.reduce(model(**without_number(batch)).loss, "mean"))
        plain = model_of("llama-2").eval()
        exact = [plain(**stacked([sample(number, 39)])).loss for number in range(rank // 2, 4, world // 2)]
    mean = torch.stack(exact).mean()
    dist.all_reduce(mean)
    assert relative_error(torch.stack(losses).mean(), mean / world) < 1e-6


def test_the_mean_of_the_ranks_losses_is_that_of_the_samples() -> None:
    spawn(_mean_of_losses, 4)


# -- saved states -----------------------------------------------------------------------------------------------------


def _saved(rank: int, world: int, folder: Path) -> None:
    runner = accelerator(2)
    model = model_of("llama-2")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader: Any = DataLoader(Samples(4), batch_size=1, collate_fn=stacked)
    wrapped, optimizer, loader = runner.prepare(model, optimizer, loader)

    def train(first: int) -> dict[str, Tensor]:
        for batch in skip_first_batches(loader, first):
            runner.backward(wrapped(**without_number(batch)).loss)
            optimizer.step()
            optimizer.zero_grad()
            first += 1
            if first == 2:
                runner.save_state(str(folder))
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    whole = train(0)
    runner.load_state(str(folder))
    resumed = train(2)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    stock = copy.deepcopy(model_of("llama-2"))
    stock.load_state_dict(runner.get_state_dict(wrapped))  # the names are those of the stock model
    twin = copy.deepcopy(model)  # shares the group, which cannot be copied
    batch = own_batch(2, rank, 40)
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)  # the message of pickle names the class; state_dict() is what is saved
    runner.unwrap_model(wrapped, keep_fp32_wrapper=False)
    runner.fpdt_handles[0].remove()
    assert not applied_settings(model)


def test_a_loaded_state_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    spawn(_saved, 2, tmp_path)


# -- FSDP2 as accelerate lays it --------------------------------------------------------------------------------------


def _fsdp2(rank: int, world: int, runs: list[tuple[str, int, bool]]) -> None:
    for case, sp, reshard in runs:
        PartialState(cpu=True)
        model = model_of(case)
        apply_fpdt(model, plugin(sp))
        settings = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=reshard,
        )
        stub: Any = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=settings),
            mixed_precision="no",
            torch_device_mesh=None,
            is_main_process=rank == 0,
            device=torch.device("cpu"),
            parallelism_config=None,
        )
        planned = units(model, world)
        model = fsdp2_prepare_model(stub, model)
        for _ in range(2):
            model.zero_grad()
            with counting_fsdp(world) as sent:
                loss = model(**own_batch(sp, rank, 63)).loss
                loss.backward()
            if reshard:
                check_sent(planned, sent)
            check_against(case, 63, world // sp, model, loss)


def units(model: nn.Module, ranks: int) -> ShardedWeights:
    """What the planner counts, of a model whose head is not its embedding; FSDP2 fills rows up for ranks to divide."""
    base: Any = getattr(model, "get_base_model", lambda: model)()

    def filled(parameters: Iterator[nn.Parameter]) -> int:
        return sum(-(-len(p) // ranks) * ranks * p[0].numel() * p.element_size() for p in parameters)

    layers = [filled(layer.parameters()) for layer in decoder_layers(base)]
    embedding = filled(base.get_input_embeddings().parameters())
    assert len(set(layers)) == 1
    return ShardedWeights(
        ranks=ranks,
        layers=len(layers),
        layer=layers[0],
        embedding=embedding,
        tail=filled(model.parameters()) - sum(layers) - embedding,
        trained=filled(p for p in model.parameters() if p.requires_grad),
    )


def check_sent(planned: ShardedWeights, sent: dict[str, int]) -> None:
    def check(weights: ShardedWeights) -> None:
        assert sent == {"gathered": weights.gathered_bytes(), "reduced": weights.reduced_bytes()}

    check(planned)
    changes = {name: {name: getattr(planned, name) + planned.ranks} for name in vars(planned)}
    assert_rejects(check, {name: dataclasses.replace(planned, **change) for name, change in changes.items()})


def test_fsdp2_as_accelerate_prepares_it_equals_one_process() -> None:
    spawn(_fsdp2, 2, [(case, sp, True) for case in ("llama-2", "llama-2+lora", "neox") for sp in (1, 2)])


def test_fsdp2_without_resharding_and_beside_data_parallelism_equals_one_process() -> None:
    spawn(_fsdp2, 4, [("llama-1", 2, False), ("neox+lora", 4, True)])


# -- refusals ---------------------------------------------------------------------------------------------------------


def stub(**changes: Any) -> Any:
    """What `_refused_options` reads of an Accelerator; nothing is refused without `changes`."""
    fsdp, dynamo = changes.pop("fsdp", None), SimpleNamespace(backend=changes.pop("dynamo", DynamoBackend.NO))
    chosen: dict[str, Any] = {
        "distributed_type": DistributedType.MULTI_GPU,
        "state": SimpleNamespace(fsdp_plugin=fsdp, dynamo_plugin=dynamo),
        "dispatch_batches": None,
        "parallelism_config": None,
    }
    return SimpleNamespace(**(chosen | changes))


def fsdp(version: int = 2, checkpointing: bool = False) -> SimpleNamespace:
    return SimpleNamespace(fsdp_version=version, activation_checkpointing=checkpointing)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({}, []),
        ({"fsdp": fsdp()}, []),
        ({"parallelism_config": SimpleNamespace(tp_size=1, cp_size=1, sp_size=1, dp_shard_size=4)}, []),
        ({"distributed_type": DistributedType.DEEPSPEED}, ["DEEPSPEED is not supported; use DDP or FSDP2"]),
        ({"distributed_type": DistributedType.MEGATRON_LM}, ["MEGATRON_LM is not supported"]),
        ({"fsdp": fsdp(1)}, ["set fsdp_version: 2"]),
        ({"fsdp": fsdp(2, True)}, ["activation checkpointing would"]),
        ({"fsdp": fsdp(1, True)}, ["set fsdp_version: 2", "activation checkpointing would"]),
        ({"dynamo": DynamoBackend.INDUCTOR}, ["dynamo_backend"]),
        ({"dispatch_batches": True}, ["dispatch_batches=True"]),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=2, sp_size=2)},
            [rf"ParallelismConfig({name})" for name in ("tp_size", "cp_size", "sp_size")],
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be_right_are_named(changes: dict[str, Any], messages: list[str]) -> None:
    reasons = _refused_options(stub(**changes))
    assert len(reasons) == len(messages), reasons
    for reason, message in zip(reasons, messages, strict=True):
        assert message in reason


def test_accelerators_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="dispatch_batches=True"):
        accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    with pytest.raises(RuntimeError, match="sp_size=2 needs 2 processes.*accelerate launch"):
        accelerator(2)
    with pytest.raises(TypeError, match="takes a transformers model"):
        accelerator().prepare(nn.Linear(2, 2))
    runner = accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2))
    assert runner.gather_for_metrics(torch.arange(3)).tolist() == [0, 1, 2]
    assert isinstance(runner, Accelerator) and runner.gradient_accumulation_steps == 2


def _uncounted(rank: int, world: int, sp: int) -> None:
    """Accelerate takes a CPU for one process unless it is told that the CPU is what is meant."""
    with pytest.raises(NotImplementedError, match=r"counts 1 process\(es\) where 2 were started.*cpu=True"):
        FPDTAccelerator(fpdt_plugin=FPDTPlugin(sp_size=sp, chunk_tokens=16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Accelerate counts them")
def test_processes_that_accelerate_does_not_count_are_refused() -> None:
    spawn(_uncounted, 2, 2)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "8")
    AcceleratorState._reset_state(reset_partial_state=True)
    runner = FPDTAccelerator(cpu=True)
    model = runner.prepare(tiny("llama"))
    assert runner.fpdt_plugin.chunk_tokens == 8 and applied_settings(model)


def test_compiled_models_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="dynamo_backend"):
        FPDTAccelerator(cpu=True, dynamo_backend="eager")
