"""What the picture of a plan shows are the plan's own numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hf_fpdt.forecast.curves import memory_curve, moments, reach_by_host
from hf_fpdt.forecast.fit import Machines, PlannedStep, Training, Use, Weights, fit
from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.forecast.searches import longest
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.units import GIB

LAYERS = 8
MODEL = ModelSizes(
    layers=LAYERS,
    hidden=4096,
    intermediate=14_336,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    layer_parameters=218_112_000,
)
WINDOWED = replace(MODEL, windows=(4096, 4096, 4096, None) * 2)
TRAINING = Training(
    model=MODEL,
    weights=Weights(total=2_800_000_000, trained=40_000_000, largest_trained=2_000_000, outside=1_050_000_000),
    vocabulary=128_256,
    chunk_tokens=32_768,
    loss_tokens=1024,
)
ONE = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=48 * GIB)
SMALL = replace(GPUS["h100"], memory_gib=44.0)

CASES = {
    "all on the device": (TRAINING, ONE, 131_072),
    "on the host, K and V too": (TRAINING, replace(ONE, gpu=SMALL, host_bytes=96 * GIB), 1_000_000),
    "windows": (replace(TRAINING, model=WINDOWED), replace(ONE, gpu=SMALL, host_bytes=96 * GIB), 1_000_000),
    "windows alone": (
        replace(TRAINING, model=replace(MODEL, windows=(4096,) * LAYERS)),
        replace(ONE, gpu=SMALL, host_bytes=24 * GIB),
        524_288,
    ),
    "inputs rebuilt": (TRAINING, replace(ONE, gpu=SMALL, host_bytes=24 * GIB), 524_288),
    "in files": (TRAINING, replace(ONE, gpu=SMALL, host_bytes=24 * GIB, disk_bytes=200 * GIB), 524_288),
    "two GPUs, every weight": (
        replace(TRAINING, weights=replace(TRAINING.weights, trained=TRAINING.weights.total)),
        replace(ONE, gpus=2, sharded=True),
        524_288,
    ),
}


@pytest.fixture(params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> PlannedStep:
    return fit(*CASES[request.param])


def curve_of(found: PlannedStep):  # type: ignore[no-untyped-def]
    return memory_curve(found, full=False)


def test_cases_are_what_they_are_called() -> None:
    plans = {name: fit(*case).plan for name, case in CASES.items()}
    forecast = {name: plan.forecast for name, plan in plans.items()}
    assert forecast["all on the device"].host_bytes == 0 and forecast["in files"].disk_bytes > 0
    assert plans["on the host, K and V too"].kv.host_bytes > 0
    assert plans["inputs rebuilt"].kept.rebuilt > 0
    assert plans["windows"].kv.host_bytes > 0 == plans["windows alone"].kv.host_buffer_bytes
    assert not any(moment.host_kv for moment in moments(fit(*CASES["windows alone"])))


def test_the_largest_of_every_item_is_the_plans(found: PlannedStep) -> None:
    curve = curve_of(found)
    assert {name: max(values) for name, values in curve.device.items()} == pytest.approx(
        {name: size / GIB for name, size in found.device}
    )
    assert list(curve.device) == [name for name, _ in found.device]
    assert curve.planned_gib == pytest.approx(sum(size for _, size in found.device) / GIB)
    assert all(sum(now) <= curve.planned_gib * (1 + 1e-9) for now in zip(*curve.device.values(), strict=True))


def test_hosts_use_what_is_pinned_and_no_more(found: PlannedStep) -> None:
    curve = curve_of(found)
    assert curve.pinned_gib == found.host / GIB
    largest = sum(max(values) for values in curve.host.values())
    assert max(map(sum, zip(*curve.host.values(), strict=True))) <= curve.pinned_gib * (1 + 1e-9)
    # K, V and checkpoints have buffers of their own; one size may lie free while another is asked for.
    assert 0.98 * curve.pinned_gib <= largest <= curve.pinned_gib * (1 + 1e-9)


def test_nothing_is_left_at_the_end(found: PlannedStep) -> None:
    last, forecast = moments(found)[-1], found.plan.forecast
    assert last.phase == "backward" and last.layer == last.chunk == 0
    assert last.device == last.host == last.disk == 0
    assert max(moment.disk for moment in moments(found)) == forecast.disk_bytes


def test_time_goes_on_to_the_seconds_of_the_plan(found: PlannedStep) -> None:
    curve = curve_of(found)
    assert curve.seconds[-1] == pytest.approx(found.seconds)
    assert all(earlier < later for earlier, later in pairwise(curve.seconds))
    assert 0.15 * found.seconds < curve.backward_from < 0.42 * found.seconds, "backward is the larger part"
    assert len(curve.seconds) == len(moments(found)) + 1, "the loss is a moment of its own"
    for values in (*curve.device.values(), *curve.host.values()):
        assert len(values) == len(curve.seconds)


def test_checkpoints_grow_forward_and_shrink_backward() -> None:
    found = fit(*CASES["all on the device"])
    curve = curve_of(found)
    turn = curve.seconds.index(curve.backward_from)
    held = curve.device[Use.CHECKPOINTS]
    assert all(a <= b for a, b in pairwise(held[: turn + 1])) and all(a >= b for a, b in pairwise(held[turn:]))
    assert held[turn] == max(held) > 0 == held[-1]
    assert curve.device[Use.WORKING][0] != curve.device[Use.WORKING][-1], "each phase has its own"
    assert curve.device[Use.KV][0] < curve.device[Use.KV][-1], "dK and dV come with the backward pass"


def test_reach_is_the_planners_with_other_hosts() -> None:
    machines = replace(ONE, gpu=SMALL)
    reach = list(reach_by_host(TRAINING, machines))
    hosts = [point.host_gib for point in reach]
    assert hosts == sorted(set(hosts)) and hosts[0] == 0 and hosts[-1] == 96 and 48 in hosts
    assert all(a.tokens <= b.tokens for a, b in pairwise(reach))
    for point in reach[::4]:
        best = longest(TRAINING, replace(machines, host_bytes=int(point.host_gib * GIB)))
        assert best is not None and best.step.plan.n_tokens == point.tokens
    assert reach[0].tokens < reach[-1].tokens


def test_reach_is_zero_where_nothing_fits() -> None:
    reach = list(reach_by_host(TRAINING, replace(ONE, gpu=replace(SMALL, memory_gib=3.0), host_bytes=0)))
    assert all(point.tokens == 0 for point in reach) and reach[-1].host_gib > 0
