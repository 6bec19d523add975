"""The shared comparisons must be able to fail, and the shared inputs must be as hard as they claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.support import assert_as_accurate, assert_rejects, peaked_qkv, relative_error, spawn

TRUTH = torch.linspace(-3.0, 3.0, 101, dtype=torch.float64)
NAIVE = (TRUTH + 1e-3).float()


def test_as_accurate_allows_twice_the_naive_error_and_no_more() -> None:
    def check(ours: Tensor) -> None:
        assert_as_accurate(ours, NAIVE, TRUTH, name="x")

    check((TRUTH - 1.9e-3).float())
    hole = TRUTH.float()
    hole[7] = float("nan")
    broken = {
        "too far": (TRUTH + 2.1e-3).float(),
        "NaN": hole,
        "shape": TRUTH[1:].float(),
        "dtype": TRUTH.half(),
    }
    assert_rejects(check, broken)


def test_as_accurate_accepts_the_rounded_truth_when_the_naive_run_is_lucky() -> None:
    truth = torch.tensor([1.0 + 2.0**-9], dtype=torch.float64)
    assert_as_accurate(truth.bfloat16(), truth.bfloat16(), truth)
    with pytest.raises(AssertionError, match="loss: our error 1.*naive error 0"):
        assert_as_accurate(torch.tensor([2.0]), torch.tensor([1.0]), truth.float().round().double(), name="loss")


def test_as_accurate_rejects_a_naive_run_of_nan() -> None:
    with pytest.raises(AssertionError, match="naive error nan"):
        assert_as_accurate(TRUTH.float(), torch.full_like(NAIVE, float("nan")), TRUTH)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_assert_rejects_names_the_variant_that_passed() -> None:
    def check(value: int) -> None:
        assert 1 // value == 1

    assert_rejects(check, {"two": 2})
    with pytest.raises(AssertionError, match="'one' pass"):
        assert_rejects(check, {"two": 2, "one": 1})
    with pytest.raises(AssertionError, match="'zero' crashed"):
        assert_rejects(check, {"zero": 0})
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_rejects(check, {})


@pytest.mark.parametrize("kv_len", [64, 1024])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_peaked_qkv_is_peaked(kv_len: int, head_dim: int) -> None:
    q, k, v = peaked_qkv(2, 48, kv_len, 4, 2, head_dim, torch.bfloat16, seed=1)
    assert q.shape == (2, 48, 4, head_dim) and k.shape == v.shape == (2, kv_len, 2, head_dim)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    keys = k.double().repeat_interleave(2, dim=2)
    scores = torch.einsum("bsnh,btnh->bnst", q.double(), keys) * head_dim**-0.5
    assert scores.softmax(-1).amax(-1).median() > 0.5


def _allocate(source: str, module: str, **names: Any) -> Any:
    return eval(source, {"__name__": module, "torch": torch, **names})


@pytest.mark.parametrize(
    "source",
    ["torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(3).new_empty(3, dtype=torch.bfloat16)"],
)
def test_uninitialised_memory_is_nan_for_the_package_alone(source: str) -> None:
    assert _allocate(source, "hf_fpdt.memory.transfers").isnan().all()
    assert _allocate(source, "hf_fpdt").isnan().all()


def test_byte_buffers_are_nan_in_every_floating_view() -> None:
    buffer = _allocate("torch.empty(16, dtype=torch.uint8)", "hf_fpdt.memory.transfers")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert buffer.view(dtype).isnan().all()


def test_other_callers_get_what_they_asked_for() -> None:
    sevens = torch.full((3,), 7.0)
    assert _allocate("torch.empty(3, out=out)", "hf_fpdt_other", out=sevens).eq(7).all()


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> None:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    assert total.item() == sum(range(world_size)) + offset * world_size


def _fail_on_rank_one(rank: int, world_size: int, error: Exception) -> None:
    if rank == 1:
        raise error
    dist.barrier()


def test_spawn_joins_the_processes() -> None:
    spawn(_sum_of_ranks, 2, 10)


@pytest.mark.parametrize(("raised", "seen"), [(KeyError, RuntimeError), (AssertionError, AssertionError)])
def test_spawn_raises_the_first_failure_with_its_traceback(raised: type[Exception], seen: type[Exception]) -> None:
    with pytest.raises(seen, match="rank 1 of 2(?s:.*)_fail_on_rank_one(?s:.*)broke"):
        spawn(_fail_on_rank_one, 2, raised("broke"))
