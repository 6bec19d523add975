"""Offload and rebuilt inputs on several ranks: sequence parallelism, DDP and FSDP2 over gloo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import hf_fpdt.engine.calls
import hf_fpdt.engine.layer
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.layer_run import LayerRun
from hf_fpdt.forecast.collectives import ShardedWeights
from hf_fpdt.model.apply import FPDTHandle, applied_settings
from hf_fpdt.plan.placement import linear_share
from hf_fpdt.plan.sizes import StepSizes
from tests.helpers import offloaded
from tests.helpers.support import assert_rejects, counting_fsdp, spawn
from tests.parallel.test_sequence_parallel import CHUNK, gradients, own_batch, sample, stacked
from tests.training.test_accelerator import units

TOKENS = 77
LAYERS = 5


def model_of(case: str) -> PreTrainedModel:
    """As in the tests of sequence parallelism, of five layers."""
    return offloaded.model_of(case, layers=LAYERS)


def sizes(model: nn.Module, sp: int, n_tokens: int = TOKENS) -> StepSizes:
    """Sizes of a rank's step, before its model runs."""
    settings = applied_settings(model)
    assert settings is not None
    own = -(-n_tokens // sp)
    return settings.step(torch.empty(1, own, settings.sizes.hidden, dtype=torch.float64))


def applied(case: str, sp: int, place: str, policy: str, n_tokens: int = TOKENS) -> tuple[PreTrainedModel, FPDTHandle]:
    """A model with everything on the host, as much of it as the policy needs least if `place` is "tight"."""
    model = model_of(case)
    settings: dict[str, Any] = {"chunk_tokens": CHUNK, "sp_size": sp, "checkpoints": policy, "loss_chunk_tokens": 10}
    host = 2**30
    if place == "tight":
        probe = apply_fpdt(model, FPDTPlugin(**settings))
        host = offloaded.least_host_bytes(policy, sizes(model, sp, n_tokens))
        probe.remove()
    handle = apply_fpdt(model, FPDTPlugin(**settings, device_budget_gib=0, host_budget_gib=host / 2**30))
    return model, handle


def expected(case: str, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Mean over samples of the gradients, on one process without offload."""
    model = model_of(case)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    for index, n_tokens in enumerate(lengths):
        (model(**stacked([sample(index, n_tokens)])).loss / len(lengths)).backward()
    return gradients(model)


def check(case: str, lengths: list[int], model: nn.Module) -> None:
    exact, ours = expected(case, lengths), gradients(model)
    assert ours.keys() == exact.keys()
    for name, grad in exact.items():
        error = float((ours[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-6)
        assert error < 1e-10, f"{name}: {error:.1e}"


def assert_rebuilt(handle: FPDTHandle, *, some: bool = True) -> None:
    """Plans of training passes rebuild inputs (or none do); everything was given back."""
    rebuilt = [plan.kept.rebuilt for plan in handle.store.plans.values()]
    assert rebuilt and all((count > 0) == some for count in rebuilt)
    assert not any(handle.store.used_bytes()[tier] for tier in ("device", "host", "disk"))


def assert_linears(handle: FPDTHandle, *, all_kept: bool) -> None:
    """Outputs of linears were kept, or none was."""
    plans = handle.store.plans.items()
    shares = [linear_share(plan.kept, sizes, range(plan.kept.layers)) for (sizes, _), plan in plans]
    assert shares and set(shares) == {float(all_kept)}


def _ddp(rank: int, world: int, runs: list[tuple[str, int, str, str]]) -> None:
    for case, sp, place, policy in runs:
        model, handle = applied(case, sp, place, policy)
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(**own_batch(sp, rank, TOKENS)).loss.backward()
            check(case, [TOKENS] * (world // sp), wrapped)
        assert_rebuilt(handle, some=policy == "segment" or (place == "tight" and policy != "linears"))
        assert_linears(handle, all_kept=policy == "linears")


RUNS = [("llama", "host", "segment"), ("neox+lora", "tight", "attention"), ("neox-sequential", "tight", "auto")]


def test_two_ranks_share_sequences() -> None:
    kept = [("llama", "host", "attention"), ("llama+lora", "host", "linears"), ("neox", "tight", "linears")]
    spawn(_ddp, 2, [(case, 2, place, policy) for case, place, policy in (*RUNS, *kept)])


def test_ddp_with_lora() -> None:
    spawn(
        _ddp, 2, [("llama+lora", 1, place, policy) for place, policy in (("host", "segment"), ("tight", "attention"))]
    )


def test_two_pairs_share_sequences() -> None:
    spawn(_ddp, 4, [("llama", 2, "host", "segment")])


def shard(model: PreTrainedModel, reshard: bool) -> list[Any]:
    """A unit a layer and the root; the layers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = list(base.get_decoder().layers)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    return layers


def gathered(weights: ShardedWeights, handle: FPDTHandle) -> int:
    """What the planner counts; all outside of the layers is the root's unit here, which is put into shards too."""
    weights = replace(weights, embedding=weights.embedding + weights.tail, tail=0)
    (kept,) = (plan.kept for plan in handle.store.plans.values())
    return weights.gathered_bytes() + weights.rebuilt_bytes(kept.rebuilt)


def _fsdp(rank: int, world: int, runs: list[tuple[str, int, str, str, bool]]) -> None:
    again = hf_fpdt.engine.layer._forward_again
    for case, sp, place, policy, reshard in runs:
        model, handle = applied(case, sp, place, policy)
        weights = units(model, world)
        layers = shard(model, reshard)
        rebuilt: list[int] = []

        def watched(lower: LayerRun, upper: LayerRun, device: torch.device, seen: list[int] = rebuilt) -> None:
            seen.append(lower.index)
            again(lower, upper, device)

        hf_fpdt.engine.layer._forward_again = watched
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-30)  # steps, and moves nothing
        try:
            for _ in range(2):
                optimizer.zero_grad()
                with counting_fsdp(world) as sent:
                    model(**own_batch(sp, rank, TOKENS)).loss.backward()
                if reshard:
                    assert sent["gathered"] == gathered(weights, handle), sent
                check(case, [TOKENS] * (world // sp), model)
                for layer in layers:
                    assert all(isinstance(p, DTensor) for p in layer.parameters()), "a layer stayed whole"
                optimizer.step()
        finally:
            hf_fpdt.engine.layer._forward_again = again
        assert rebuilt and len(rebuilt) % 2 == 0, rebuilt
        assert_rebuilt(handle)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_gathers_what_is_rebuilt(reshard: bool) -> None:
    runs = [(case, sp, place, policy, reshard) for case, place, policy in RUNS for sp in (1, 2)]
    spawn(_fsdp, 2, runs[: 5 if reshard else 2])


def _fsdp_linears(rank: int, world: int, runs: list[tuple[str, int, list[int]]]) -> None:
    """A linear whose output was kept is not run in backward, and needs its weight there."""
    for case, sp, lengths in runs:
        model, handle = applied(case, sp, "host", "linears", max(lengths))
        shard(model, True)
        for _ in range(2):
            model.zero_grad()
            model(**own_batch(sp, rank, lengths[rank])).loss.backward()
            check(case, lengths[: world // sp], model)
        assert_rebuilt(handle, some=False)
        assert_linears(handle, all_kept=True)


def test_fsdp2_with_outputs_of_linears() -> None:
    spawn(_fsdp_linears, 2, [("llama", 1, [TOKENS, 20]), ("llama+lora", 2, [TOKENS, TOKENS])])


def _different_lengths(rank: int, world: int, steps: list[list[int]]) -> None:
    """A host for what the longest needs least: a short sequence alone would need no rebuild."""
    longest = max(map(max, steps))
    model, handle = applied("llama", 1, "tight", "attention", longest)
    host, shortest = handle.plugin.host_budget_gib, min(map(min, steps))
    assert float(host) * 2**30 > offloaded.everything_bytes(sizes(model, 1, shortest))
    shard(model, True)
    for lengths in steps:
        model.zero_grad()
        model(**own_batch(1, rank, lengths[rank])).loss.backward()
        check("llama", lengths, model)
        with torch.no_grad():
            model(**own_batch(1, rank, lengths[1 - rank]))
    if len({tuple(sorted(lengths)) for lengths in steps}) == 1:
        assert_rebuilt(handle)


def test_ranks_with_other_lengths_rebuild_the_same_layers() -> None:
    spawn(_different_lengths, 2, [[TOKENS, 20], [20, TOKENS]])


def test_lengths_that_change_on_all_ranks() -> None:
    spawn(_different_lengths, 2, [[20, TOKENS], [20, 20], [40, 13], [TOKENS, 33]])


def _broken(rank: int, world: int, bug: str) -> None:
    model, _ = applied("llama", 2, "host", "segment")
    if bug == "another attention output":
        calls: Any = hf_fpdt.engine.calls
        exchange = calls.AttentionCall.row_forward
        calls.RebuildCall.row_forward = lambda self: tuple(x.flip(0) * 1.5 for x in exchange(self))
    model(**own_batch(2, rank, TOKENS)).loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    check("llama", [TOKENS], model)


def test_the_check_rejects_a_wrong_rebuild() -> None:
    spawn(_broken, 2, "none")
    assert_rejects(lambda bug: spawn(_broken, 2, bug), {"rerun": "another attention output"})
