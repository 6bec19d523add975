"""Plans of models with recurrent layers: operations by hand, what is kept, and where a chunk ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.forecast.seconds import step_seconds, ulysses_seconds
from hf_fpdt.layout import ChunkPlan
from hf_fpdt.model.settings import no_single_token
from hf_fpdt.plan import (
    NO_LIMIT,
    Budgets,
    LayerMix,
    ModelSizes,
    StateSize,
    StepSizes,
    chunk_work,
    described,
    plan_pass,
)
from hf_fpdt.plan.operations import strict_flops

STATES = (StateSize("conv 0", 40), StateSize("recurrent 0", 1000, 4))
SCAN = LayerMix(attends=False, linear_weights=700, states=STATES, channels=10)
ATTENDS, NEITHER = LayerMix(attends=True, linear_weights=500), LayerMix(attends=False, linear_weights=300)
MODEL = ModelSizes(
    layers=4, hidden=8, intermediate=16, q_heads=2, kv_heads=1, head_dim=4, rotary_dim=4, layer_parameters=600,
    mixes=(SCAN, ATTENDS, NEITHER, SCAN),
)  # fmt: skip


def step_of(tokens: int = 20, chunk: int = 8, ranks: int = 1) -> StepSizes:
    return StepSizes(MODEL, ChunkPlan(tokens, chunk, ranks), batch=2, loss_tokens=4, vocabulary=50)


def test_operations_are_those_of_each_kind_of_layer() -> None:
    tokens, pairs = 20, 20 * 20 / 2
    linear, scan, attention = 700 + 500 + 300 + 700 + 50 * 8, 2 * 6 * 1000, 2 * pairs * 2 * (4 + 4)
    assert strict_flops(MODEL, 50, tokens, full=False) == tokens * (4 * linear + 3 * scan) + 3 * attention
    assert strict_flops(MODEL, 50, tokens, full=True) == tokens * (6 * linear + 3 * scan) + 3 * attention
    assert strict_flops(replace(MODEL, mixes=(ATTENDS,) * 4), 50, tokens, full=False) > 3 * 4 * attention
    step = step_of()
    works = [
        chunk_work(step, chunk, phase, attends=phase == "forward", full=False, mix=mix)
        for mix in MODEL.mixes
        for chunk in step.plan.chunks
        for phase in ("forward", "backward")
    ]
    in_layers = 2 * (tokens * (4 * (linear - 400) + 3 * scan) + 3 * attention)  # two rows, without the head
    assert sum(work.strict for work in works) == pytest.approx(in_layers)
    assert sum(work.done for work in works) > sum(work.strict for work in works)


def test_states_stand_at_every_border_and_only_attention_has_keys_and_outputs() -> None:
    step = step_of()
    sizes, kv = step.layer_bytes(), step.kv_bytes(NO_LIMIT)
    one = {"conv 0": 2 * 40 * 2, "recurrent 0": 2 * 1000 * 4}
    assert [dict(sizes.states_of(layer)) for layer in range(4)] == [one, {}, {}, one]
    assert sizes.all_states == 2 * 2 * sum(one.values()), "two layers, two borders"
    assert [sizes.attention_of(layer) > 0 for layer in range(4)] == [False, True, False, False]
    assert [kv.is_windowed(layer) for layer in range(4)] == [True, False, True, True]
    assert step_of(ranks=2).layer_bytes().states_of(0) == {"conv 0": 160, "recurrent 0": 4000}, "its own heads"
    plan = plan_pass("attention", step, 4, Budgets(NO_LIMIT, 0))
    assert plan.kept.attentions == (True,) * 4 and plan.kept.attention_reruns == 0
    text = described(plan, step, Budgets(NO_LIMIT, 0))
    assert "2 of 4 layers carry a state" in text and "keeps 4 inputs and 1 attention outputs of 4 layers" in text
    assert plan_pass("input", step, 4, Budgets(NO_LIMIT, 0)).kept.attentions == (True, False, True, True)
    with pytest.raises(MemoryError):
        plan_pass("segment", step, 4, Budgets(sizes.all_states, 0))


def test_a_scan_takes_time_and_its_exchange_too() -> None:
    gpu, step = GPUS["h100"], step_of(2**20, 2**15)
    kept = plan_pass("input", step, 4, Budgets(NO_LIMIT, 0)).kept
    without = replace(step, model=replace(MODEL, mixes=(NEITHER, ATTENDS, NEITHER, NEITHER)))
    more = step_seconds(step, kept, gpu, full=False) - step_seconds(without, kept, gpu, full=False)
    products = 2 * 2**21 * 2 * 400 * 3.14 / gpu.matmul
    scans = 2 * 2**21 * (2 + 2.9) * (16 * 6 * 1000 / gpu.matmul + 12 * 10 * 2 / gpu.memory)
    assert more == pytest.approx(products + scans, rel=0.05)
    shared, alone = (replace(each, plan=ChunkPlan(2**20, 2**15, 2)) for each in (step, without))
    assert ulysses_seconds(shared, kept, gpu) > ulysses_seconds(alone, kept, gpu) > 0


@pytest.mark.parametrize(
    ("tokens", "chunk", "expected"),
    [
        *((33, 8, 7), (32, 8, 8), (9, 8, 7), (1, 8, 8), (2049, 1024, 768), (65_537, 32_768, 32_512)),
        *((5, 2, 3), (37, 4, 5), (6, 1, 2), (3, 2, 3), (1, 1, 1)),
    ],
)
def test_no_chunk_is_of_one_token(tokens: int, chunk: int, expected: int) -> None:
    found = no_single_token(tokens, chunk)
    assert found == expected and (tokens % found != 1 or tokens in (1, found)) and (found > 1 or tokens == 1)
    with pytest.raises(ValueError, match="leaves each of 2 ranks a single token"):
        no_single_token(2 * 8 + 2, 8, 2)
