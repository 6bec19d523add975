"""What a pass keeps: the arithmetic against a step simulated entry by entry, plans against every other plan."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from hf_fpdt.plan.checkpointing import KeptLayers, candidates, forward_bytes, least_bytes, peak_bytes, segmented
from hf_fpdt.plan.layer_bytes import LayerBytes
from tests.helpers.stores import random_kept, sizes_of, with_linears
from tests.helpers.support import assert_rejects

UNIT = LayerBytes(inputs=(1,), outs=(1,), lses=(0,))
POLICIES = ("attention", "input", "segment", "auto")
Peak = Callable[[KeptLayers, LayerBytes], int]


def simulated_peak(kept: KeptLayers, sizes: LayerBytes) -> int:
    """A step played with a dict of live entries, one layer after the other, as the executor goes."""
    weight = {"input": sum(sizes.inputs), "row": sum(sizes.outs) + sum(sizes.lses)}
    linears = [0] * kept.layers
    for layer, counts in enumerate(kept.linears):
        for count, linear in zip(counts, sizes.linears[layer], strict=True):
            linears[layer] += sum(size for i, size in enumerate(reversed(linear.chunks)) if i < count.kept)
    live: dict[tuple[str, int], int] = {}
    most = 0

    def put(name: str, layer: int) -> None:
        nonlocal most
        assert (name, layer) not in live, "kept twice"
        live[name, layer] = linears[layer] if name == "linears" else weight[name]
        most = max(most, sum(live.values()))

    for layer in range(kept.layers):
        if kept.inputs[layer]:
            put("input", layer)
        if kept.attentions[layer]:
            put("row", layer)
        put("linears", layer)
    for layer in reversed(range(kept.layers)):
        base = max(index for index in range(layer + 1) if ("input", index) in live)
        for below in range(base, layer):
            if ("row", below) not in live:
                put("row", below)
            put("input", below + 1)
        del live["input", layer]
        live.pop(("row", layer), None)
        del live["linears", layer]
    assert not live
    return most


def cases() -> Iterator[tuple[KeptLayers, LayerBytes]]:
    rng = random.Random(0)
    for _ in range(400):
        kept, chunks = random_kept(rng, rng.randrange(1, 14)), rng.randrange(1, 4)
        sizes = sizes_of(rng, chunks)
        yield with_linears(rng, kept, sizes, list(sizes.lses)) if rng.random() < 0.5 else (kept, sizes)


def assert_peaks(peak: Peak) -> None:
    for kept, sizes in cases():
        assert peak(kept, sizes) == simulated_peak(kept, sizes), (kept, sizes)


def test_the_peak_is_that_of_a_step_played_entry_by_entry() -> None:
    assert_peaks(peak_bytes)

    def forgets_rebuilt_rows(kept: KeptLayers, sizes: LayerBytes) -> int:
        return peak_bytes(replace(kept, attentions=(True,) * kept.layers), sizes) - (
            kept.attention_reruns * sizes.attention_total
        )

    assert_rejects(
        assert_peaks,
        {
            "forward alone": forward_bytes,
            "rebuilt rows forgotten": forgets_rebuilt_rows,
            "lse forgotten": lambda kept, sizes: peak_bytes(kept, replace(sizes, lses=(0,) * len(sizes.lses))),
            "linears forgotten": lambda kept, sizes: peak_bytes(replace(kept, linears=()), sizes),
            "nothing is freed": lambda kept, sizes: forward_bytes(kept, sizes) + kept.rebuilt * sizes.input_total,
        },
    )


def assert_segments(plan_of: Callable[[int, list[bool], LayerBytes, int], KeptLayers | None]) -> None:
    rng, found = random.Random(1), 0
    for _ in range(600):
        layers, sizes = rng.randrange(1, 14), sizes_of(rng, 2)
        outs, inputs = [rng.random() < 0.5 for _ in range(layers)], rng.randrange(1, layers + 1)
        budget = rng.randrange(layers * (sizes.input_total + sizes.attention_total) + 1)
        plan = plan_of(inputs, outs, sizes, budget)
        if plan is not None:
            found += 1
            assert simulated_peak(plan, sizes) <= budget
            assert plan.inputs[0] and plan.inputs.count(True) == inputs and plan.attentions == tuple(outs)
    assert found > 100


def test_a_segmented_plan_stays_within_its_budget_and_keeps_as_many_inputs_as_asked() -> None:
    assert_segments(segmented)

    def equal_segments(inputs: int, outs: list[bool], sizes: LayerBytes, budget: int) -> KeptLayers | None:
        if segmented(inputs, outs, sizes, budget) is None:
            return None
        starts = [len(outs) * part // inputs for part in range(inputs)]
        return KeptLayers(tuple(layer in starts for layer in range(len(outs))), tuple(outs))

    assert_rejects(
        assert_segments,
        {
            "segments of one size": equal_segments,
            "half the budget again": lambda n, outs, sizes, budget: segmented(n, outs, sizes, budget * 3 // 2),
            "one input too many": lambda n, outs, *a: segmented(min(n + 1, len(outs)), outs, *a),
        },
    )


def masks(layers: int) -> Iterator[tuple[bool, ...]]:
    return ((True, *rest) for rest in itertools.product((True, False), repeat=layers - 1))


def exhaustive_least(layers: int, sizes: LayerBytes, outs: tuple[bool, ...]) -> int:
    return min(simulated_peak(KeptLayers(inputs, outs), sizes) for inputs in masks(layers))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7, 9])
def test_no_plan_at_all_holds_less_than_the_least(layers: int) -> None:
    rng = random.Random(layers)
    for _ in range(4):
        sizes = sizes_of(rng, 1)
        for policy, out in (("attention", True), ("segment", False)):
            assert least_bytes(policy, layers, sizes) == exhaustive_least(layers, sizes, (out,) * layers)


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
def test_no_choice_of_attention_outputs_holds_less_than_none(layers: int) -> None:
    rng = random.Random(layers)
    for _ in range(3):
        sizes = sizes_of(rng, 1)
        every = itertools.product((True, False), repeat=layers)
        assert least_bytes("auto", layers, sizes) == min(exhaustive_least(layers, sizes, outs) for outs in every)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_least_is_exactly_the_threshold(policy: str) -> None:
    rng = random.Random(2)
    for _ in range(20):
        layers, sizes = rng.randrange(1, 12), sizes_of(rng, 2)
        least = least_bytes(policy, layers, sizes)
        assert next(candidates(policy, sizes, least, (1.0,) * layers), None) is not None
        assert next(candidates(policy, sizes, least - 1, (1.0,) * layers), None) is None


def test_candidates_come_fastest_first_and_within_budget() -> None:
    rng, ratio = random.Random(3), 0.7
    for policy in POLICIES:
        for _ in range(15):
            layers, sizes = rng.randrange(1, 10), sizes_of(rng, 2)
            budget = least_bytes(policy, layers, sizes) + rng.randrange(layers * sizes.input_total)
            plans = list(candidates(policy, sizes, budget, (ratio,) * layers))
            costs = [ratio * plan.attention_reruns + plan.rebuilt for plan in plans]
            assert plans and costs == sorted(costs)
            assert all(simulated_peak(plan, sizes) <= budget and plan.inputs[0] for plan in plans)


def first(policy: str, layers: int, sizes: LayerBytes, budget: int, ratio: float = 1.0) -> KeptLayers:
    return next(candidates(policy, sizes, budget, (ratio,) * layers))


def test_policies_keep_what_they_say() -> None:
    rng, plenty = random.Random(4), 10**9
    for layers in range(1, 12):
        sizes, every, none = sizes_of(rng, 2), (True,) * layers, (False,) * layers
        assert list(candidates("input", sizes, plenty, (1.0,) * layers)) == [KeptLayers(every, none)]
        assert all(plan.attentions == every for plan in candidates("attention", sizes, plenty, (1.0,) * layers))
        for policy in ("attention", "auto"):
            assert first(policy, layers, sizes, plenty) == KeptLayers(every, every), (
                "nothing is run again where all fits"
            )
        (segment,) = candidates("segment", sizes, plenty, (1.0,) * layers)
        assert segment.attentions == none
        assert simulated_peak(segment, sizes) == least_bytes("segment", layers, sizes)


def test_a_larger_budget_never_costs_more_reruns() -> None:
    rng = random.Random(5)
    for ratio, layers in ((0.3, 5), (1.0, 8), (50.0, 10)):
        sizes = sizes_of(rng, 1)
        least, most = least_bytes("auto", layers, sizes), layers * (sizes.input_total + sizes.attention_total)
        plans = [first("auto", layers, sizes, budget, ratio) for budget in range(least, most + 1)]
        costs = [ratio * plan.attention_reruns + plan.rebuilt for plan in plans]
        assert costs == sorted(costs, reverse=True) and costs[-1] == 0 < costs[0]
        if ratio > layers:
            reruns = [plan.attention_reruns for plan in plans]
            assert reruns == sorted(reruns, reverse=True)


def segment_sizes(kept: KeptLayers) -> list[int]:
    """From the top down."""
    starts = [layer for layer, there in enumerate(kept.inputs) if there]
    return [stop - start for start, stop in itertools.pairwise([*starts, kept.layers])][::-1]


def test_segments_grow_downwards_and_need_no_room_of_their_own() -> None:
    assert least_bytes("attention", 32, UNIT) == 37
    assert least_bytes("segment", 32, UNIT) == 11
    assert least_bytes("input", 32, UNIT) == 32
    every = (True,) * 32
    assert (
        peak_bytes(KeptLayers(every, every), UNIT) == 64 and peak_bytes(KeptLayers(every, (False,) * 32), UNIT) == 32
    )

    attention = segmented(5, [True] * 31, UNIT, 31 + 5)
    assert attention is not None and segment_sizes(attention) == [1, 3, 7, 15, 5]
    segment = segmented(10, [False] * 30, UNIT, 10)
    assert segment is not None and segment_sizes(segment) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for kept in (attention, segment):
        assert peak_bytes(kept, UNIT) == forward_bytes(kept, UNIT)


def test_a_layer_knows_whose_input_it_is_rebuilt_from() -> None:
    kept = KeptLayers((True, False, False, True, False), (True, False, True, True, False))
    assert [kept.base(layer) for layer in range(5)] == [0, 0, 0, 3, 3]
    assert (kept.layers, kept.rebuilt, kept.attention_reruns) == (5, 3, 2)
    assert kept.rebuilt_attentions == 1, "of layers 0, 1 and 3; nothing is rebuilt from the last"
    assert str(kept) == "2 inputs and 3 attention outputs of 5 layers"
