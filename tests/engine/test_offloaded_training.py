"""Offloaded training gives what training without offload gives: bit for bit, and the plain model's gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_fpdt.engine.layer
from hf_fpdt.engine.layer_run import LayerRun
from hf_fpdt.engine.replay_state import RandomState
from hf_fpdt.memory.entries import HostEntry
from hf_fpdt.memory.transfers import Transfers
from hf_fpdt.plan.placement import plan_pass
from hf_fpdt.plan.tiers import Budgets
from tests.engine.test_layer import assert_equal
from tests.helpers.offloaded import (
    LAYERS,
    PLACES,
    POLICIES,
    Results,
    applied,
    assert_same_bits,
    budgets,
    least_host_bytes,
    model_of,
    sequences,
    sizes_of,
    step,
)
from tests.helpers.support import assert_rejects
from tests.helpers.truth import truth

CASES = ("llama", "neox", "neox-sequential", "neox+lora")
REBUILT = {"attention", "segment", "auto"}  # policies that rebuild inputs where the host is tight


@pytest.mark.parametrize("case", CASES)
def test_every_place_and_policy_gives_the_same_bits(case: str, tmp_path: Path) -> None:
    """With dropout and the "math" kernel, whose calls are the same wherever K, V lie."""
    model, data = model_of(case, dropout=0.2), sequences()
    sizes = sizes_of(model)
    plain, handle = applied(model, kernel="math", checkpoints="attention")
    exact = step(plain, data)
    other_masks = dict(exact, loss=plain(**data).loss.detach())
    handle.remove()
    # Adapters change what a layer is, not where it lies: two policies do.
    policies = ("attention", "segment") if "lora" in case else POLICIES
    for policy, place in itertools.product(policies, PLACES):
        if policy == "auto" and "tight" not in place:
            continue  # is "attention"
        ours, handle = applied(model, kernel="math", **budgets(place, policy, sizes, tmp_path))
        for _ in range(2 if case == "neox" else 1):  # in fresh buffers, and in used ones
            assert_same_bits(step(ours, data), exact)
        (plan,) = handle.store.plans.values()
        assert (plan.kv.backward_resident == 2) == ("part" in place)
        assert (plan.forecast.disk_bytes > 0) == (place == "disk")
        if "tight" in place or policy == "segment":
            assert (plan.kept.rebuilt > 0) == (policy in REBUILT)
        handle.remove()
    if "neox" in case or "lora" in case:
        assert_rejects(lambda results: assert_same_bits(results, exact), {"other masks": other_masks})


@pytest.mark.parametrize("case", ["llama", "neox-sequential"])
def test_every_place_and_policy_is_the_plain_model(case: str, tmp_path: Path) -> None:
    model, data = model_of(case), sequences()
    sizes, exact = sizes_of(model), truth(model, data["input_ids"], data["labels"])
    for policy, place in itertools.product(POLICIES, PLACES):
        ours, handle = applied(model, **budgets(place, policy, sizes, tmp_path))
        assert_equal(step(ours, data), exact, 1e-10)
        handle.remove()


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 64, 65])
def test_few_chunks_are_the_plain_model(n_tokens: int, tmp_path: Path) -> None:
    model, data = model_of("llama"), sequences(n_tokens + 1)
    sizes, exact = sizes_of(model, n_tokens + 1), truth(model, data["input_ids"], data["labels"])
    for policy, place in itertools.product(("attention", "segment"), ("host", "disk", "tight")):
        ours, handle = applied(model, **budgets(place, policy, sizes, tmp_path))
        assert_equal(step(ours, data), exact, 1e-10)
        handle.remove()


def test_broken_offload_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of bits can fail: each of these bugs makes it."""
    model, data = model_of("neox", dropout=0.2), sequences()
    settings = {"kernel": "math", **budgets("tight", "attention", sizes_of(model), None)}
    plain, handle = applied(model, kernel="math")
    exact = step(plain, data)
    handle.remove()

    def broken(owner: Any, name: str, value: Any) -> Callable[[], Results]:
        def run() -> Results:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, value)
                ours, handle = applied(model, **settings)
                results = [step(ours, data) for _ in range(2)]
                handle.remove()
            return results[1]

        return run

    def check(run: Callable[[], Results]) -> None:
        assert_same_bits(run(), exact)

    again, to_host = hf_fpdt.engine.layer._forward_again, Transfers.to_host

    def other_masks(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(RandomState, "restore", lambda _: None)
            again(*args)

    def skipped(lower: LayerRun, upper: LayerRun, device: torch.device) -> None:
        for chunk in lower.plan.chunks:
            upper.kept.put("input", chunk, lower.kept.peek("input", chunk), rebuilt=True)

    written: set[int] = set()

    def stale(self: Transfers, source: Tensor, buffer: Tensor) -> object:
        """What lay in a buffer first stays there."""
        if buffer.data_ptr() in written:
            return to_host(self, source, torch.empty_like(buffer))
        written.add(buffer.data_ptr())
        return to_host(self, source, buffer)

    check(broken(hf_fpdt.engine.layer, "_forward_again", again))
    assert_rejects(
        check,
        {
            "rebuilt with other masks": broken(hf_fpdt.engine.layer, "_forward_again", other_masks),
            "replayed with other masks": broken(RandomState, "restore", lambda _: None),
            "a layer skipped in a rebuild": broken(hf_fpdt.engine.layer, "_forward_again", skipped),
            "sums of gradients not written back": broken(HostEntry, "write", lambda self, value: None),
            "a stale buffer": broken(Transfers, "to_host", stale),
        },
    )


def test_auto_walks_from_no_rerun_to_reruns_as_the_host_shrinks() -> None:
    model, data = model_of("neox", dropout=0.2), sequences()
    sizes = sizes_of(model)
    plain, handle = applied(model, kernel="math")
    exact = step(plain, data)
    handle.remove()
    most, least = (least_host_bytes(policy, sizes) for policy in ("input", "auto"))
    everything = plan_pass("attention", sizes, LAYERS, Budgets(0, 2**30)).forecast
    assert everything is not None
    seen = []
    for part in range(6):
        host = everything.host_bytes - (everything.host_bytes - least) * part // 5
        ours, handle = applied(
            model, kernel="math", checkpoints="auto", device_budget_gib=0, host_budget_gib=host / 2**30
        )
        assert_same_bits(step(ours, data), exact)
        (plan,) = handle.store.plans.values()
        assert handle.store.used_bytes()["pinned"] <= host
        seen.append((plan.kept.rebuilt, plan.kept.attention_reruns))
        handle.remove()
    assert seen[0] == (0, 0) and seen[-1][0] > 0 and seen[-1][1] > 0 and least < most
    costs = [rebuilt + reruns for rebuilt, reruns in seen]
    assert costs == sorted(costs) and len(set(costs)) > 3


# -- layers that are not chained ------------------------------------------------------------------------------------


def _added(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.3 * args[0].roll(1, dims=2), *args[1:])


def _scaled_in_place(module: Any, args: tuple[Tensor, ...]) -> None:
    args[0].mul_(0.7)


def _square_view(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As many tokens as elements: the output's own memory, seen in another order."""
    return (args[0].transpose(1, 2), *args[1:])


@pytest.mark.parametrize("hook", [_added, _scaled_in_place, _square_view])
@pytest.mark.parametrize("where", [(2,), (1, 2, 4)])
@pytest.mark.parametrize("place", ["host", "part"])
def test_what_happens_between_two_layers_is_not_lost(hook: Any, where: tuple[int, ...], place: str) -> None:
    """An input that is not the output below is kept, whatever the plan says."""
    model, data = model_of("llama"), sequences(32 if hook is _square_view else 118)
    length = data["input_ids"].shape[1]
    hooked(model, hook, where)
    sizes, exact = sizes_of(model, length), truth(model, data["input_ids"], data["labels"])
    for policy in ("segment", "attention"):
        settings = budgets(place, policy, sizes, None) | {"chunk_tokens": min(32, length // 3)}
        ours, _ = applied(model, **settings)
        assert_equal(step(ours, data), exact, 1e-10)
    if hook is not _square_view:
        hooked(ours, hook, where)
        assert_rejects(lambda model: assert_equal(step(model, data), exact, 1e-10), {"twice": ours})


def hooked(model: PreTrainedModel, hook: Any, where: tuple[int, ...]) -> None:
    for index in where:
        model.get_decoder().layers[index].register_forward_pre_hook(hook)
