"""Recurrent layers on several ranks: many gloo processes against one plain model, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hf_fpdt.parallel.scans
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.parallel.scans import why_not_scan_heads
from tests.helpers.kinds import TOLERANCE, in_double, with_adapters
from tests.helpers.recurrent import recurrent
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.parallel.test_sequence_parallel import CHUNK, gradients, own_batch, sample, shard, stacked

Run = tuple[str, int, dict[str, Any]]  # family, sp_size, what else the plugin is given
TOKENS = 60
# Two key and four value heads, two groups: repeated where there are more ranks.
CASES = ["qwen3_5_text", "olmo_hybrid", "bamba", "falcon_h1", "lfm2"]
HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 1}


def model_of(case: str) -> Any:
    name, _, lora = case.partition("+")
    changes: dict[str, Any] = {"linear_num_heads": 4} if name == "kimi_linear" else {}
    model = recurrent(name, vocab_size=97, **changes)
    return with_adapters(model) if lora else model


def check(case: str, samples: int, model: nn.Module, loss: Tensor) -> None:
    """Loss (mean over ranks) and, DDP or FSDP having averaged them, the gradients are those of the plain model."""
    plain = model_of(case)
    losses = [plain(**stacked([sample(each, TOKENS)])).loss for each in range(samples)]
    torch.stack(losses).mean().backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert relative_error(mean / dist.get_world_size(), torch.stack(losses).mean().detach()) < TOLERANCE, case
    ours, exact = gradients(model), gradients(plain)
    assert ours.keys() == exact.keys()
    floor = 1e-3 * max(float(grad.abs().max()) for grad in exact.values())
    for name, grad in exact.items():
        error = float((ours[name] - grad).abs().max()) / max(float(grad.abs().max()), floor)
        assert error < TOLERANCE, f"{case}: {name}: {error:.1e}"


def step(case: str, sp: int, rank: int, world: int, options: dict[str, Any]) -> None:
    model = model_of(case)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10, **options))
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**own_batch(sp, rank, TOKENS)).loss
    loss.backward()
    check(case, world // sp, wrapped, loss)
    with torch.no_grad():
        evaluated = wrapped.eval()(**own_batch(sp, rank, TOKENS)).loss
    assert relative_error(evaluated, loss.detach()) < TOLERANCE, f"{case}: in evaluation"


def _ddp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for case, sp, options in runs:
            step(case, sp, rank, world, options)


def _broken(rank: int, world: int) -> None:
    """Neighbours' tokens, the states that a rank hands on, and gradients of both, all count."""
    right = SequenceParallelGroup.gather, hf_fpdt.parallel.scans._Halo.backward

    def lonely(self: Any, value: Tensor) -> list[Tensor]:
        return [each if r == self.rank else torch.zeros_like(each) for r, each in enumerate(right[0](self, value))]

    def cut_off(ctx: Any, d_before: Tensor, d_last: Tensor) -> Any:
        return right[1](ctx, torch.zeros_like(d_before), d_last)

    def not_handed_on(ctx: Any, d_before: Tensor, d_last: Tensor) -> Any:
        return right[1](ctx, d_before, torch.zeros_like(d_last))

    broken = {
        "halo": (SequenceParallelGroup, "gather", lonely),
        "gradient of the halo": (hf_fpdt.parallel.scans._Halo, "backward", staticmethod(cut_off)),
        "gradient of the last inputs": (hf_fpdt.parallel.scans._Halo, "backward", staticmethod(not_handed_on)),
    }

    def check_with(change: tuple[Any, str, Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*change)
            step("qwen3_5_text", 2, rank, world, {})

    with in_double():
        assert_rejects(check_with, broken)


def test_two_ranks_equal_one_process() -> None:
    runs: list[Run] = [(case, 2, {}) for case in (*CASES, "kimi_linear")]
    runs += [("qwen3_5_text", 1, HOST), ("qwen3_5_text+lora", 2, {"checkpoints": "segment", **HOST})]
    spawn(_ddp, 2, runs)
    spawn(_broken, 2)


def test_four_ranks_equal_one_process() -> None:
    """More ranks than key heads and than groups; two samples of two ranks each."""
    spawn(_ddp, 4, [*((case, 4, {}) for case in CASES), ("nemotron_h", 2, {}), ("qwen3_next", 2, {})])


def _fsdp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for case, sp, options in runs:
            model = model_of(case)
            apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10, **options))
            shard(model, True, None)
            for _ in range(2):  # the second step starts from resharded weights
                model.zero_grad()
                loss = model(**own_batch(sp, rank, TOKENS)).loss
                loss.backward()
                check(case, world // sp, model, loss)


def test_fsdp2_equals_one_process() -> None:
    rebuilt = {"checkpoints": "segment", **HOST}
    spawn(
        _fsdp, 2, [("qwen3_5_text", 1, {}), ("qwen3_5_text", 2, rebuilt), ("falcon_h1", 2, {}), ("bamba", 1, rebuilt)]
    )


def _refused(rank: int, world: int) -> None:
    with pytest.raises(NotImplementedError, match=r"3 heads of its recurrence .*take one of 1, 3"):
        apply_fpdt(recurrent("kimi_linear").float(), FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    with pytest.raises(NotImplementedError, match="takes no position_ids"):
        apply_fpdt(recurrent("mamba2").float(), FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    model: Any = recurrent("qwen3_5_text").float()
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    with pytest.raises(ValueError, match="leaves each of 2 ranks a single token"):
        model.model.layers[0]._fpdt_settings.plan_of(CHUNK // 2 + 1, on_gpu=False)


def test_what_ranks_cannot_share_is_refused_with_what_they_can() -> None:
    spawn(_refused, 2)
    assert why_not_scan_heads((2, 4), 4) is None and why_not_scan_heads((), 8) is None
    assert "take one of 1, 2, 4" in (why_not_scan_heads((2, 4), 8) or "")
