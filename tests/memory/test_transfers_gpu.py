"""Offloading on a GPU: nothing changes a bit, whatever is slow; uninitialised memory never reaches a result."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory.transfers import Transfers
from hf_fpdt.model.shapes import build_random, llama_8b, neox_6_9b, with_layers
from hf_fpdt.plan.placement import plan_pass
from hf_fpdt.plan.tiers import Budgets
from tests.helpers.support import nan_filled_empty

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product is made
pytestmark = pytest.mark.gpu
GIB, MIB = 2**30, 2**20
LAYERS, N_TOKENS, CHUNK = 4, 4 * 1024 + 77, 1024
Results = dict[str, Tensor]

PLACES: dict[str, dict[str, Any]] = {
    "all on the host": {"device_budget_gib": 0},
    "half on the host": {"device_budget_gib": 0.04},
    "rebuilt": {"device_budget_gib": 0, "checkpoints": "attention", "host_budget_gib": "least"},
    "rebuilt with attention": {"device_budget_gib": 0, "checkpoints": "segment"},
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The same bits from run to run: the kernel is "math" below, for the others add up dQ in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def least_host_gib(model: torch.nn.Module) -> float:
    """The least host memory with which every attention output is kept: then inputs are rebuilt."""
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    step = handle._settings.step(torch.empty(1, N_TOKENS, 1024, dtype=torch.bfloat16, device="cuda"))
    handle.remove()
    for mib in itertools.count(1):
        with contextlib.suppress(MemoryError):
            plan = plan_pass("attention", step, LAYERS, Budgets(0, mib * MIB))
            assert plan.kept.rebuilt
            return mib / 1024
    raise AssertionError


def small(shape: str) -> torch.nn.Module:
    """A few narrow layers of a shape, bf16 on the GPU."""
    config = with_layers({"llama": llama_8b, "neox": neox_6_9b}[shape](), LAYERS)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 1024, "num_attention_heads": 8}
    for name, value in sizes.items():
        setattr(config, name, value)
    if shape == "llama":
        config.num_key_value_heads, config.head_dim = 2, 128
    torch.manual_seed(0)
    return build_random(config, "cuda", torch.bfloat16, lora=False)


def gradients(model: torch.nn.Module, **settings: Any) -> Results:
    """Loss and gradients of the second of two steps: the first finds fresh buffers, the second used ones."""
    ids = torch.randint(0, 1024, (1, N_TOKENS), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    if settings.get("host_budget_gib") == "least":
        settings["host_budget_gib"] = least_host_gib(model)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, kernel="math", **settings))
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    handle.remove()
    return {"loss": loss.detach()} | {name: cast(Tensor, p.grad).clone() for name, p in model.named_parameters()}


def assert_same_bits(ours: Results, expected: Results) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), f"{name} differs"


@pytest.mark.parametrize("shape", ["llama", "neox"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_have_the_bits_of_those_without_offload(shape: str, place: str) -> None:
    """The "math" kernel is asked for pairs wherever K and V lie: the same calls in the same order."""
    model = small(shape)
    resident = gradients(model)
    assert_same_bits(gradients(model, **PLACES[place]), resident)


@contextmanager
def delayed(which: str, cycles: int = 3_000_000) -> Iterator[None]:
    """Every copy finds one of the three streams busy for about two milliseconds."""
    copy = Transfers._copy

    def late(self: Transfers, stream: Any, target: Tensor, source: Tensor) -> Any:
        slow = {"in": self.into_device, "out": self.out_of_device, "compute": torch.cuda.current_stream()}[which]
        with torch.cuda.stream(slow):
            torch.cuda._sleep(cycles)
        return copy(self, stream, target, source)

    Transfers._copy = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Transfers._copy = copy  # type: ignore[method-assign]


@pytest.mark.parametrize("slow", ["in", "out", "compute"])
@pytest.mark.parametrize("place", PLACES)
def test_a_slow_stream_changes_nothing(slow: str, place: str) -> None:
    """A missing wait would show: what is read too early holds NaN, or the values of the step before."""
    model = small("llama")
    expected = gradients(model, **PLACES[place])
    with delayed(slow), nan_filled_empty():
        assert_same_bits(gradients(model, **PLACES[place]), expected)


@pytest.mark.parametrize("broken", ["fetched", "left"])
def test_the_test_above_sees_a_missing_wait(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison without the computation's wait for copies in, or theirs for the computation."""
    model = small("llama")
    expected = gradients(model, device_budget_gib=0)
    if broken == "fetched":
        monkeypatch.setattr("hf_fpdt.memory.transfers.Copy.settle", lambda self: None)
    else:
        monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, stream: None)
    with delayed("in" if broken == "fetched" else "compute"):
        wrong = gradients(model, device_budget_gib=0)
    torch.cuda.synchronize()
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(wrong, expected)


@pytest.mark.gpu(2)
def test_a_model_on_another_gpu_than_the_current_one_gives_the_same_bits() -> None:
    model = small("llama")
    expected = gradients(model, device_budget_gib=0)
    other = gradients(model.to("cuda:1"), device_budget_gib=0)
    assert_same_bits({name: value.to("cuda:0") for name, value in other.items()}, expected)
