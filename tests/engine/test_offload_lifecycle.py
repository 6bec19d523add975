"""The store over many steps: predicted to the byte, nothing left behind, whatever the order of passes."""

from __future__ import annotations

import copy
import gc
import itertools
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_fpdt.engine.calls
from hf_fpdt.attention.kernels.table import select_kernel
from hf_fpdt.memory.pinned import PinnedMemory
from hf_fpdt.model.apply import FPDTHandle
from hf_fpdt.plan.tiers import STAGING_BUFFERS
from hf_fpdt.units import page_rounded
from tests.engine.test_layer import assert_equal
from tests.helpers.offloaded import (
    PLACES,
    POLICIES,
    applied,
    assert_same_bits,
    budgets,
    gradients,
    measured,
    model_of,
    sequences,
    sizes_of,
    step,
)
from tests.helpers.support import assert_rejects
from tests.helpers.truth import truth

LENGTHS = (150, 77, 20, 150)


def assert_empty(handle: FPDTHandle) -> int:
    """Nothing is in use; the bytes that are pinned."""
    used = dict(handle.store.used_bytes())
    pinned = used.pop("pinned")
    assert used == {"device": 0, "host": 0, "disk": 0}
    return pinned


def plans_of(handle: FPDTHandle) -> list[Any]:
    return list(handle.store.plans.values())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", ["llama", "neox"])
def test_a_step_takes_what_was_predicted_to_the_byte(case: str, place: str, tmp_path: Path) -> None:
    model, data = model_of(case), sequences()
    sizes = sizes_of(model)
    for policy in POLICIES:
        ours, handle = applied(model, **budgets(place, policy, sizes, tmp_path))
        for _ in range(2):
            with measured() as bytes_kept:
                step(ours, data)
            (plan,) = plans_of(handle)
            predicted = plan.forecast
            assert (bytes_kept.peak["device"], bytes_kept.peak["disk"]) == (
                predicted.device_bytes,
                predicted.disk_bytes,
            )
            assert assert_empty(handle) == predicted.host_bytes
            # The host's regions themselves, with the staging buffers of files.
            tiers = handle.store._tiers.memory
            assert tiers is not None
            pinned = [tiers.pinned, *([] if tiers.files is None else [tiers.files.pinned])]
            regions = sum(memory.nbytes for memory in pinned)
            staged = STAGING_BUFFERS * page_rounded(sizes.layer_bytes().longest) if predicted.disk_bytes else 0
            assert regions == predicted.host_bytes + staged
            assert bytes_kept.peak["host"] + plan.kv.host_buffer_bytes <= predicted.host_bytes
        handle.remove()


def test_pages_are_all_that_is_pinned_beyond_the_bytes_kept() -> None:
    """With chunks of whole pages no host byte is wasted: K and V, and every layer's checkpoints."""
    model, data = model_of("neox"), sequences(6 * 128, 4)
    ours, handle = applied(model, chunk_tokens=128, checkpoints="attention", device_budget_gib=0)
    with measured() as bytes_kept:
        step(ours, data)
    (plan,) = plans_of(handle)
    assert assert_empty(handle) == bytes_kept.peak["host"] + plan.kv.host_bytes


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("policy", ["segment", "auto"])
def test_lengths_may_change_from_step_to_step(policy: str, place: str, tmp_path: Path) -> None:
    """Longest first: what it pinned serves the others, in training and in evaluation."""
    model = model_of("llama")
    settings = budgets(place, policy, sizes_of(model, max(LENGTHS)), tmp_path)
    ours, handle = applied(model, **settings)
    pinned = []
    for n_tokens in LENGTHS:
        data = sequences(n_tokens)
        exact = truth(model, data["input_ids"], data["labels"])
        assert_equal(step(ours, data), exact, 1e-10)
        pinned.append(assert_empty(handle))
        with torch.no_grad():
            torch.testing.assert_close(ours(**data).loss, exact["loss"], rtol=1e-12, atol=0)
        pinned.append(assert_empty(handle))
    assert max(pinned) <= settings["host_budget_gib"] * 2**30
    if place in ("host", "part"):  # where the host is short, a shorter step has room to keep more
        assert len(set(pinned)) == 1


@pytest.mark.parametrize("place", ["tight", "tight part"])
def test_steps_of_many_lengths_pin_host_memory_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is full in each of them, and buffers of one length are of no use to another."""
    model, pinned = model_of("llama"), list[int]()
    make = PinnedMemory._new_region

    def counted(self: PinnedMemory, nbytes: int) -> Any:
        pinned.append(nbytes)
        return make(self, nbytes)

    monkeypatch.setattr(PinnedMemory, "_new_region", counted)
    monkeypatch.setattr("hf_fpdt.memory.pinned.REGION_BYTES", 2**16)  # as many parts as at a real length
    settings = budgets(place, "auto", sizes_of(model, 150), Path())
    settings["host_budget_gib"] *= 1.2
    limit = int(settings["host_budget_gib"] * 2**30)
    ours, handle = applied(model, **settings)
    for n_tokens in (150, 131, 149, 117, 140, 133, 150, 127):
        data = sequences(n_tokens)
        assert_equal(step(ours, data), truth(model, data["input_ids"], data["labels"]), 1e-10)
        assert assert_empty(handle) <= limit
    assert 0.8 * limit < sum(pinned) < 1.1 * limit


@pytest.mark.parametrize("place", PLACES)
def test_lengths_and_rows_may_grow(place: str, tmp_path: Path) -> None:
    """Longer entries than the buffers, those of files too, were made for; within the budget all the same."""
    model = model_of("llama")
    settings = budgets(place, "segment", sizes_of(model, 150, 3), tmp_path)
    ours, handle = applied(model, **settings)
    for n_tokens, rows in ((20, 1), (70, 1), (20, 3), (150, 3), (70, 1), (150, 3)):
        data = sequences(n_tokens, rows)
        assert_equal(step(ours, data), truth(model, data["input_ids"], data["labels"]), 1e-10)
        assert assert_empty(handle) <= settings["host_budget_gib"] * 2**30


@pytest.mark.parametrize("place", PLACES)
def test_evaluation_and_training_take_turns(place: str, tmp_path: Path) -> None:
    model, data = model_of("neox"), sequences()
    ours, handle = applied(model, **budgets(place, "segment", sizes_of(model), tmp_path))
    exact, pinned = truth(model, data["input_ids"], data["labels"]), []
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(ours(**data).loss, exact["loss"], rtol=1e-12, atol=0)
        assert_empty(handle)
        assert_equal(step(ours, data), exact, 1e-10)
        pinned.append(assert_empty(handle))
    assert len(set(pinned)) == 1


@pytest.mark.parametrize("place", PLACES)
def test_a_loss_without_backward_gives_its_bytes_back(place: str, tmp_path: Path) -> None:
    model, data = model_of("llama"), sequences()
    ours, handle = applied(model, **budgets(place, "attention", sizes_of(model), tmp_path))
    exact = step(ours, data)
    pinned = assert_empty(handle)
    for _ in range(3):
        loss = ours(**data).loss
        assert any(handle.store.used_bytes()[tier] for tier in ("device", "host", "disk"))
        del loss
        gc.collect()
        assert assert_empty(handle) == pinned
    assert_same_bits(step(ours, data), exact)


@pytest.mark.parametrize("place", ["host", "part", "disk"])
@pytest.mark.parametrize("policy", ["attention", "segment"])
@pytest.mark.parametrize("reverse", [False, True])
def test_two_forward_passes_before_two_backward_passes(policy: str, place: str, reverse: bool, tmp_path: Path) -> None:
    """As in DPO, by one sum of losses or one after the other."""
    model = model_of("llama")
    data = [sequences(150, seed=1), sequences(90, seed=2)]
    exact = [truth(model, one["input_ids"], one["labels"]) for one in data]
    ours, handle = applied(model, **budgets(place, policy, sizes_of(model, 150), tmp_path))
    for _ in range(2):
        losses = [ours(**one).loss for one in data]
        for loss in reversed(losses) if reverse else losses:
            loss.backward()
        total = {name: exact[0][name] + exact[1][name] for name in exact[0]}
        assert_equal(gradients(ours, losses[0] + losses[1]), total, 1e-10)
        assert_empty(handle)
    losses = [ours(**one).loss for one in data]
    (losses[0] + losses[1]).backward()
    assert_equal(gradients(ours, losses[0] + losses[1]), total, 1e-10)
    assert_empty(handle)


def test_gradients_accumulate_over_steps() -> None:
    model = model_of("neox+lora")
    data = [sequences(150, seed=1), sequences(90, seed=2)]
    exact = [truth(model, one["input_ids"], one["labels"]) for one in data]
    ours, handle = applied(model, **budgets("tight", "attention", sizes_of(model, 150), None))
    for one in data:
        loss = ours(**one).loss
        loss.backward()
    sums = {name: exact[0][name] + exact[1][name] for name in exact[0]} | {"loss": exact[1]["loss"]}
    ours_summed = gradients(ours, loss)
    assert_equal(ours_summed, sums, 1e-10)
    assert_rejects(lambda results: assert_equal(results, sums, 1e-10), {"the last step alone": exact[1]})
    assert_empty(handle)


@contextmanager
def raising_once(patch: pytest.MonkeyPatch, call: int, what: str) -> Any:
    """The kernel's pass `what` raises in its `call`-th call."""
    calls = itertools.count()

    def selected(*args: Any) -> Any:
        kernel = copy.copy(select_kernel(*args))
        original = getattr(kernel, what)

        def failing(*tensors: Tensor, **options: Any) -> Any:
            if next(calls) == call:
                raise FloatingPointError("once")
            return original(*tensors, **options)

        object.__setattr__(kernel, what, failing)
        return kernel

    with patch.context() as inner:
        inner.setattr(hf_fpdt.engine.calls, "select_kernel", selected)
        yield


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("what", "call"), [("forward", 9), ("forward", 62), ("backward", 0), ("backward", 17)])
def test_an_exception_in_the_middle_leaves_a_store_that_works(
    what: str, call: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forward pass, in a rebuild or rerun, and in a backward pass."""
    model, data = model_of("llama"), sequences()
    ours, handle = applied(model, **budgets(place, "segment", sizes_of(model), tmp_path))
    exact = step(ours, data)
    pinned = assert_empty(handle)
    with raising_once(monkeypatch, call, what), pytest.raises(FloatingPointError) as raised:
        step(ours, data)
    del raised
    gc.collect()
    assert assert_empty(handle) == pinned
    ours.zero_grad(set_to_none=True)
    assert_same_bits(step(ours, data), exact)
    assert assert_empty(handle) == pinned
