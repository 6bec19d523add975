"""Layers with a window, values of another width: bytes and operations against keys counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from hf_fpdt.layout.chunks import Chunk, ChunkPlan
from hf_fpdt.model.shapes import SHAPES
from hf_fpdt.plan.checkpointing import KeptLayers, candidates
from hf_fpdt.plan.kv_bytes import KVBytes
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.operations import BACKWARD_OPERATIONS, Work, chunk_work, pass_work, strict_flops
from hf_fpdt.plan.placement import described_windows, plan_pass
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import Budgets
from hf_fpdt.units import GIB
from tests.helpers.stores import NO_LIMIT, TINY
from tests.helpers.support import assert_rejects

# Four layers that see 5 keys, all, 3 and as many as there are tokens; keys 8 wide and values 6.
MIXED = replace(TINY, value_dim=6, windows=(5, None, 3, 22))
ALL = replace(TINY, windows=(5, 5, 3, 3))


def step_of(model: ModelSizes, plan: ChunkPlan | None = None, **sizes: Any) -> StepSizes:
    return StepSizes(model, ChunkPlan(22, 8) if plan is None else plan, **{"attention_bytes": 2, **sizes})


def seen(query: int, window: int | None) -> range:
    """The keys that a query sees, by their definition."""
    return range(0 if window is None else max(0, query - window + 1), query + 1)


def pairs(queries: range, window: int | None) -> float:
    """Half a pair for a query's own key, as all count causal attention; a full window counts as it is."""
    return sum(len(seen(query, window)) - (window is None or query < window) / 2 for query in queries)


def test_windows_are_one_a_layer_or_none() -> None:
    assert [MIXED.window(layer) for layer in range(4)] == [5, None, 3, 22] and TINY.window(3) is None
    assert MIXED.windows_at(22) == (5, None, 3, None) and MIXED.windows_at(23) == (5, None, 3, 22)
    assert MIXED.windows_at(4) == (None, None, 3, None) and TINY.windows_at(4) == (None,) * 4
    assert step_of(MIXED).windows_of_last(2) == (3, None)
    with pytest.raises(ValueError, match=r"ModelSizes\(windows=\(5,\)\): one for each of 4 layers"):
        replace(TINY, windows=(5,))


def test_a_width_of_values_that_is_not_said_is_that_of_keys() -> None:
    assert TINY.value_dim == 8 and MIXED.value_dim == 6
    of = ModelSizes.of(AutoConfig.for_model("deepseek_v3"), layers=61, layer_parameters=11_507_288_064)
    assert (of.head_dim, of.value_dim, of.rotary_dim, of.kv_heads, of.windows) == (192, 128, 64, 128, ())
    assert of.gated and of.intermediate == 9 * 2048 == of.linear_weights // 7168 // 3 - of.latent_weights // 7168 // 3


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt-oss-20b", 2 * 2880 * 72 * 64 + 3 * 2880 * 4 * 2880),
        ("gemma3-27b", 2 * 5376 * 48 * 128 + 3 * 5376 * 21_504),
        ("deepseek-v2-lite", 2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256 + 3 * 2048 * 8 * 1408),
    ],
)
def test_weights_that_a_token_meets_leave_out_experts_that_it_does_not(name: str, weights: int) -> None:
    config: Any = SHAPES[name]()
    layer = {"gpt-oss-20b": 823_186_976, "gemma3-27b": 412_898_560, "deepseek-v2-lite": 584_847_872}[name]
    sizes = ModelSizes.of(config, layers=config.num_hidden_layers, layer_parameters=layer)
    assert sizes.gated and sizes.linear_weights == weights
    # Beside the matrices: norms, biases, sinks and the router.
    assert weights < sizes.met_parameters < 1.005 * weights


def test_rotary_positions_are_held_for_each_kind_of_layers() -> None:
    for name, dims in (("gemma3-27b", 256), ("olmo3-7b", 256), ("gpt-oss-20b", 64), ("mistral-7b", 128)):
        config: Any = SHAPES[name]()
        assert ModelSizes.of(config, layers=config.num_hidden_layers, layer_parameters=1).rotary_dim == dims, name


# Bytes ---------------------------------------------------------------------------------------------


def ring_of(step: StepSizes, window: int, backward: bool) -> int:
    """What a step holds whose layers all have this window."""
    kv = replace(step, model=replace(step.model, windows=(window,) * step.model.layers)).kv_bytes(0)
    return kv.backward_ring if backward else kv.forward_ring


def assert_ring(ring: Callable[[StepSizes, int, bool], int]) -> None:
    for plan in (ChunkPlan(22, 8), ChunkPlan(40, 4), ChunkPlan(30, 30), ChunkPlan(48, 12, 2)):
        for window in (1, 2, 4, 5, 8, 9, 13, 21):
            step = step_of(replace(TINY, value_dim=6), plan, batch=3)
            token = 3 * step.kv_heads * (8 + 6)
            for backward in (False, True):
                most = 0
                for chunk in plan.chunks:
                    keys = {key for query in range(chunk.start, chunk.stop) for key in seen(query, window)}
                    read = [each for each in plan.chunks if keys & set(range(each.start, each.stop))]
                    held = sum(each.stop - each.start for each in read)
                    copied = len(keys) if backward or len(read) > 1 else 0
                    most = max(most, held * (2 + 4 * backward) + copied * 2)
                assert ring(step, window, backward) == token * most, (plan, window, backward)


def test_a_ring_holds_the_chunks_that_a_row_reads_and_a_copy_of_the_keys_that_it_sees() -> None:
    assert_ring(ring_of)
    assert_rejects(
        assert_ring,
        {
            "one key too many": lambda step, window, backward: ring_of(step, window + 1, backward),
            "gradients forgotten": lambda step, window, backward: ring_of(step, window, False),
            "values as wide as keys": lambda step, *a: ring_of(replace(step, model=TINY), *a),
        },
    )


def assert_two_widths(kv_of: Callable[[StepSizes, int], KVBytes]) -> None:
    """Keys 8 wide and values 6, two heads, chunks of 8, 8 and 6 tokens, two bytes, and four of gradients."""
    step = step_of(replace(TINY, value_dim=6))
    for budget in range(0, 4000, 50):
        kv = kv_of(step, budget)
        tokens = [8, 8, 6]
        forward = max(n for n in range(4) if sum(tokens[:n]) * 2 * 14 * 2 <= budget)
        backward = max(n for n in range(4) if sum(tokens[:n]) * 2 * 14 * 6 <= budget)
        assert (kv.forward_resident, kv.backward_resident) == (forward, backward)
        resident = [sum(tokens[:n]) * 2 * 14 for n in (forward, backward)]
        assert kv.device_bytes == max(2 * resident[0], 6 * resident[1])
        streamed = [sum(tokens[n:2]) * 2 * 14 * 2 for n in (forward, backward)]
        grads = sum(tokens[backward:1]) * 2 * 14 * 4
        assert kv.host_bytes == max(streamed[0], streamed[1] + grads)
        pages = 2 * (2 - min(backward, 2)) + 2 * (1 - min(backward, 1))
        assert kv.host_buffer_bytes == 4096 * pages


def test_keys_and_values_are_counted_in_their_own_width() -> None:
    def kv_of(step: StepSizes, budget: int) -> KVBytes:
        return step.kv_bytes(budget)

    assert_two_widths(kv_of)
    assert_rejects(
        assert_two_widths,
        {
            "values as wide as keys": lambda step, budget: kv_of(replace(step, model=TINY), budget),
            "widths the other way": lambda step, budget: replace(kv_of(step, budget), value_parts=(0, 0, 0)),
        },
    )
    assert step_of(MIXED).layer_bytes().outs == (8 * 4 * 6 * 2, 8 * 4 * 6 * 2, 6 * 4 * 6 * 2)
    kv = step_of(MIXED).kv_bytes(0)
    assert kv.both_parts[0] == (8 * 2 * 8 * 2, 8 * 2 * 6 * 2) and kv.both_grads[2] == (6 * 2 * 8 * 4, 6 * 2 * 6 * 4)


def test_a_model_whose_layers_all_have_windows_needs_nothing_of_the_host() -> None:
    step = step_of(ALL)
    for budget in (0, 1000, NO_LIMIT):
        kv = step.kv_bytes(budget)
        assert kv.host_bytes == kv.host_buffer_bytes == 0 and kv.all_windowed
        assert kv.device_bytes == ring_of(step, 5, True) > ring_of(step, 3, True)
    assert step_of(ALL, ChunkPlan(5, 5)).kv_bytes(0).windowed == (False, False, True, True)
    assert step_of(ALL, ChunkPlan(3, 3)).kv_bytes(0).windowed == ()


def test_one_layer_runs_at_a_time_so_rings_and_resident_keys_share_the_device() -> None:
    for budget in (0, NO_LIMIT):
        step = step_of(MIXED)
        kv = step.kv_bytes(budget)
        ring, resident = ring_of(step, 5, True), kv.resident_parts
        assert kv.windowed == (True, False, True, False)
        assert kv.device_bytes == max(ring, resident.backward + resident.grads)
        both = step.working_bytes(kv, resident=True)
        parts = {phase: step.phase_bytes(kv, phase) for phase in ("forward", "loss", "backward")}
        in_layer = {
            "forward": max(kv.forward_ring, resident.forward),
            "loss": 0,
            "backward": max(ring, resident.backward + resident.grads),
        }
        assert both == max(parts[phase] + in_layer[phase] for phase in parts)
        assert {row.kind for row in step.device_rows(kv)} >= {"ring_kv", "resident_kv"}
    assert "ring_kv" not in {row.kind for row in step_of(TINY).device_rows(step_of(TINY).kv_bytes(0))}


def test_a_pass_has_the_windows_of_the_last_layers() -> None:
    step = step_of(MIXED)
    assert step.kv_bytes(0, 2).windowed == (True, False) and step.kv_bytes(0, 1).windowed == ()
    last = step_of(replace(MIXED, windows=(None, None, 5, 3)))
    assert last.kv_bytes(0, 2).all_windowed and last.kv_bytes(0, 3).windowed == (False, True, True)
    two, three = (plan_pass("attention", last, layers, Budgets(0, GIB)).forecast for layers in (2, 3))
    assert not two.new_kv_buffers and three.new_kv_buffers


def test_a_plan_of_windows_alone_has_no_host_buffers_for_keys_and_values() -> None:
    for model, some in ((ALL, False), (MIXED, True), (TINY, True)):
        step = step_of(model)
        plan = plan_pass("auto", step, 4, Budgets(0, GIB))
        assert bool(plan.forecast.new_kv_buffers) == bool(plan.kv.host_buffer_bytes) == some
        assert plan.budgets.device == 0, "a ring that is longer than the budget leaves nothing, and no less"
    assert described_windows(step_of(MIXED)) == ["1 of 4 layers see 5 keys", "1 of 4 layers see 3 keys"]
    assert described_windows(step_of(TINY)) == []


# What is kept --------------------------------------------------------------------------------------


def assert_dearest_first(plans_of: Callable[[StepSizes, int], list[KeptLayers]]) -> None:
    """With every input kept, the attention outputs that are there are those of the layers that cost most."""
    step = step_of(replace(MIXED, windows=(5, None, 3, None)))
    costs, sizes = step.attention_costs(4), step.layer_bytes()
    for outs in range(5):
        budget = 4 * sizes.input_total + outs * sizes.attention_total
        best = plans_of(step, budget)[0]
        if not all(best.inputs):
            continue
        saved = sum(cost for cost, there in zip(costs, best.attentions, strict=True) if there)
        assert saved == pytest.approx(sum(sorted(costs, reverse=True)[:outs]))
        if outs == 1:
            assert best.attentions == (False, False, False, True), "of equals the last"


def test_auto_keeps_the_attention_outputs_that_cost_most() -> None:
    def plans_of(step: StepSizes, budget: int) -> list[KeptLayers]:
        # Linears that cost much: all inputs are kept.
        return list(candidates("auto", step.layer_bytes(), budget, [c / 1e6 for c in step.attention_costs(4)]))

    assert_dearest_first(plans_of)
    assert_rejects(
        assert_dearest_first,
        {
            "the last layers": lambda step, budget: list(candidates("auto", step.layer_bytes(), budget, (1e-6,) * 4)),
            "the cheapest": lambda step, budget: list(
                candidates("auto", step.layer_bytes(), budget, [-c / 1e6 for c in step.attention_costs(4)])
            ),
        },
    )


def test_attention_costs_what_its_pairs_do() -> None:
    costs = step_of(MIXED).attention_costs(4)
    expected = [2 * pairs(range(22), w) * 4 * 14 / 22 / (2 * 9000) for w in (5, None, 3, None)]
    assert costs == pytest.approx(expected) and step_of(MIXED).attention_costs(3) == costs[1:]


# Operations ----------------------------------------------------------------------------------------


def counted(step: StepSizes, chunk: Chunk, window: int | None) -> tuple[float, float, float]:
    """Operations of attention of a chunk forward, backward, and of backward those that are needed: two a product."""
    m, products = step.model, pairs(range(chunk.start, chunk.stop), window) * step.batch / step.plan.sp_size
    of_keys, of_values = (2 * products * m.q_heads * width for width in (m.head_dim, m.value_dim))
    # Scores and output; the scores again, dP, dV, dQ, dK.
    return of_keys + of_values, 3 * of_keys + 2 * of_values, 2 * of_keys + 2 * of_values


def assert_work(work: Callable[..., Work]) -> None:
    for plan in (ChunkPlan(22, 8), ChunkPlan(40, 8, 4)):
        step = step_of(MIXED, plan, batch=2)
        for chunk in plan.chunks:
            linear = 2.0 * 2 * (chunk.rank_stop - chunk.rank_start) * MIXED.linear_weights
            for window in (None, 1, 3, 8, 11, 40, 1000):
                forward, backward, needed = counted(step, chunk, window)
                options: dict[str, Any] = {"window": window, "full": True}
                ahead = work(step, chunk, "forward", attends=True, **options)
                assert (ahead.done, ahead.strict) == pytest.approx((linear + forward,) * 2)
                back = work(step, chunk, "backward", attends=False, **options)
                assert (back.done, back.strict) == pytest.approx((3 * linear + backward, 2 * linear + needed))
                again = work(step, chunk, "backward", attends=True, **options)
                assert again.done == pytest.approx(3 * linear + backward + forward)


def test_a_chunk_s_operations_are_those_of_its_queries_and_keys() -> None:
    assert_work(chunk_work)
    assert_rejects(
        assert_work,
        {
            "the window forgotten": lambda *a, window, **k: chunk_work(*a, window=None, **k),
            "a window of one key less": lambda *a, window, **k: chunk_work(*a, window=window and window - 1, **k),
            "values as wide as keys": lambda step, *a, **k: chunk_work(
                replace(step, model=replace(MIXED, value_dim=8)), *a, **k
            ),
        },
    )
    equal = replace(TINY, windows=MIXED.windows)
    assert equal.attention_backward(7.0) == BACKWARD_OPERATIONS * equal.attention_forward(7.0)


def assert_strict(strict: Callable[..., float]) -> None:
    for model in (MIXED, ALL, TINY, replace(MIXED, windows=())):
        for n_tokens in (1, 4, 22, 50):
            for full, factor in ((False, 4), (True, 6)):
                windows = [model.window(layer) for layer in range(4)]
                seen_pairs = sum(pairs(range(n_tokens), window) for window in windows)
                attention = 6 * seen_pairs * model.q_heads * (model.head_dim + model.value_dim)
                weights = 4 * model.linear_weights + 100 * model.hidden
                expected = factor * n_tokens * weights + attention
                assert strict(model, 100, n_tokens, full=full) == pytest.approx(expected)


def test_strict_operations_are_those_of_the_pairs_that_layers_see() -> None:
    assert_strict(strict_flops)
    assert_rejects(
        assert_strict,
        {
            "every key": lambda model, *a, **k: strict_flops(replace(model, windows=()), *a, **k),
            "half a key more": lambda model, *a, **k: strict_flops(model, *a, **k) + 6 * model.q_heads,
        },
    )


KEPT = KeptLayers((True, False, True, False), (True, False, False, True))


def assert_whole(whole: Callable[..., Work]) -> None:
    """The pass layer by layer, and chunk by chunk."""
    step = step_of(MIXED)
    for layers in (4, 3):
        kept = KeptLayers((True, *KEPT.inputs[5 - layers :]), KEPT.attentions[4 - layers :])
        total = Work()
        for layer in range(layers):
            window = step.windows[4 - layers + layer]
            rebuilds = layer + 1 < layers and not kept.inputs[layer + 1]
            for chunk in step.plan.chunks:
                for phase, attends in (
                    ("forward", True),
                    *([("rebuild", not kept.attentions[layer])] if rebuilds else []),
                    ("backward", not kept.attentions[layer] and not rebuilds),
                ):
                    total += chunk_work(step, chunk, phase, attends=attends, full=True, window=window)  # type: ignore[arg-type]
        found = whole(step, kept, full=True)
        assert (found.done, found.strict) == pytest.approx((total.done, total.strict))


def test_a_pass_is_the_sum_of_its_last_layers() -> None:
    assert_whole(pass_work)

    def first_layers(step: StepSizes, kept: KeptLayers, *, full: bool) -> Work:
        reversed_windows = replace(step, model=replace(step.model, windows=step.model.windows[::-1]))
        return pass_work(reversed_windows, kept, full=full)

    assert_rejects(assert_whole, {"windows from the wrong end": first_layers})
    everything = KeptLayers((True,) * 4, (True,) * 4)
    strict = pass_work(step_of(MIXED), everything, full=True).strict
    assert strict == pytest.approx(strict_flops(MIXED, 0, 22, full=True))
