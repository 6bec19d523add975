"""Offloading on a GPU: nothing changes a bit, whatever is slow; uninitialised memory never reaches a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.offload import Transfers
from hf_fpdt.shapes import build_random, llama_8b, neox_6_9b, with_layers
from tests.support import nan_filled_empty

pytestmark = pytest.mark.gpu
GIB = 2**30
N_TOKENS, CHUNK = 6 * 1024 + 77, 1024
Results = dict[str, Tensor]

# Everything on the host; checkpoints alone; part of K, V and checkpoints; few inputs; files behind the host.
PLACES: dict[str, dict[str, Any]] = {
    "all on the host": {"device_budget_gib": 0},
    "half on the host": {"device_budget_gib": 0.1},
    "rebuilt": {"device_budget_gib": 0, "host_budget_gib": 0.2, "checkpoints": "attention"},
}


def small(shape: str) -> torch.nn.Module:
    """A few narrow layers of a shape, bf16 on the GPU."""
    config = with_layers({"llama": llama_8b, "neox": neox_6_9b}[shape](), 5)
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
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, **settings))
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    handle.remove()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_bits(ours: Results, expected: Results) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), f"{name} differs"


@pytest.mark.parametrize("shape", ["llama", "neox"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_have_the_bits_of_those_without_offload(shape: str, place: str) -> None:
    """cuDNN is asked for pairs wherever K and V lie: the same calls in the same order."""
    model = small(shape)
    resident = gradients(model, kernel="cudnn")
    assert_same_bits(gradients(model, kernel="cudnn", **PLACES[place]), resident)


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
    expected = gradients(model, kernel="cudnn", **PLACES[place])
    with delayed(slow), nan_filled_empty():
        assert_same_bits(gradients(model, kernel="cudnn", **PLACES[place]), expected)


@pytest.mark.parametrize("broken", ["fetched", "left"])
def test_the_test_above_sees_a_missing_wait(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison without the computation's wait for copies in, or theirs for the computation."""
    model = small("llama")
    expected = gradients(model, kernel="cudnn", device_budget_gib=0)
    if broken == "fetched":
        monkeypatch.setattr("hf_fpdt.offload.Copy.settle", lambda self: None)
    else:
        monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, stream: None)
    with delayed("in" if broken == "fetched" else "compute"):
        wrong = gradients(model, kernel="cudnn", device_budget_gib=0)
    torch.cuda.synchronize()
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(wrong, expected)
