"""Which outputs of linears a step keeps: the densest, the last, within the budgets, and nothing that costs time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from hf_fpdt.forecast.fit import Machines, fit
from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.model.shapes import llama_8b, training_of
from hf_fpdt.plan.checkpointing import KeptChunks, KeptLayers, forward_bytes, linear_bytes, peak_bytes
from hf_fpdt.plan.layer_bytes import LayerBytes
from hf_fpdt.plan.linears import LINK_BYTES_AN_OPERATION, saved_of, saved_operations, under_way_bytes, with_linears
from hf_fpdt.plan.model_sizes import LinearSize, ModelSizes
from hf_fpdt.plan.operations import pass_work
from hf_fpdt.plan.placement import linear_share, plan_pass
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import Budgets
from hf_fpdt.units import GIB
from tests.helpers.stores import TINY, step_of
from tests.helpers.support import assert_rejects

K = 1024
# As wide as Llama-3.1-8B's, with a wide product that is run again besides.
LINEARS = (
    LinearSize("q", 4096, 4096),
    LinearSize("k", 4096, 1024, captured=True),
    LinearSize("o", 4096, 4096, late=True),
    LinearSize("gate", 4096, 14336, late=True),
    LinearSize("down", 14336, 4096, late=True),
)
LAYERS = 6
MODEL = ModelSizes(LAYERS, 4096, 14336, 32, 8, 128, 128, 218_112_000, linears=(LINEARS,) * LAYERS)
EVERY = KeptLayers((True,) * LAYERS, (True,) * LAYERS)


def step(n_tokens: int = 32 * K, chunk_tokens: int = 8 * K, model: ModelSizes = MODEL) -> StepSizes:
    return StepSizes(model, ChunkPlan(n_tokens, chunk_tokens))


def chosen(sizes: StepSizes, budgets: Budgets, kept: KeptLayers = EVERY, policy: str = "auto") -> KeptLayers:
    return next(with_linears(policy, kept, sizes, sizes.kv_bytes(2**62), budgets))


def values(sizes: StepSizes, layer: int, linear: int, chunk: int) -> float:
    """Operations a byte that a chunk's output saves, found by hand."""
    each, last = sizes.model.linears[layer][linear], len(sizes.plan.chunks) - 1
    return each.inputs * (2 if each.captured and chunk < last else 1)


def assert_densest(choose: Callable[[StepSizes, Budgets], KeptLayers]) -> None:
    """On a device alone: nothing that is left out would fit and save more a byte than something that is kept."""
    sizes = step()
    layer, chunks = sizes.layer_bytes(), len(sizes.plan.chunks)
    base, all_bytes = peak_bytes(EVERY, layer), 0
    for kinds in layer.linears:
        all_bytes += sum(sum(each.chunks) for each in kinds)
    for part in range(1, 11):
        room = all_bytes * part // 10
        kept = choose(sizes, Budgets(base + room, 0))
        assert peak_bytes(kept, layer) <= base + room and not linear_bytes(kept, layer).host
        places = [(at, i, c) for at in range(LAYERS) for i in range(len(LINEARS)) for c in range(chunks)]
        there = {place for place in places if kept.linears[place[0]][place[1]].tier(place[2], chunks) is not None}
        left = room - linear_bytes(kept, layer).total
        for at, i, c in set(places) - there:
            # Of one linear K and V's last chunk saves less than the others, and is kept first.
            dense = [place for place in there if LINEARS[place[1]] is not LINEARS[i]]
            fits = layer.linears[at][i].chunks[c] <= left
            assert not fits, "there was room"
            smaller = [p for p in dense if layer.linears[p[0]][p[1]].chunks[p[2]] >= layer.linears[at][i].chunks[c]]
            assert all(values(sizes, *p) >= min(values(sizes, at, i, c), LINEARS[i].inputs) for p in smaller)
        tops = [kept.linears[at][3].kept for at in range(LAYERS)]
        assert tops == sorted(tops), "the last layers first"
    assert linear_share(kept, sizes, range(LAYERS)) == 1.0


def test_on_the_device_the_densest_and_the_last_are_kept() -> None:
    assert_densest(chosen)

    def upside_down(sizes: StepSizes, budgets: Budgets) -> KeptLayers:
        kept = chosen(sizes, budgets)
        return replace(kept, linears=kept.linears[::-1])

    def one_chunk_less(sizes: StepSizes, budgets: Budgets) -> KeptLayers:
        kept = chosen(sizes, budgets)
        none = tuple(KeptChunks(max(0, each.kept - 1), max(0, each.on_device - 1)) for each in kept.linears[-1])
        return replace(kept, linears=(*kept.linears[:-1], none))

    assert_rejects(
        assert_densest,
        {
            "the first layers": upside_down,
            "room unused": one_chunk_less,
            "too much": lambda sizes, budgets: chosen(sizes, replace(budgets, device=budgets.device * 3 // 2)),
            "none": lambda sizes, budgets: replace(EVERY, linears=((KeptChunks(),) * len(LINEARS),) * LAYERS),
        },
    )


def test_what_is_saved_is_what_is_not_multiplied_again() -> None:
    sizes, one = step(30 * K), KeptChunks(2, 1)  # 8K, 8K, 8K, 6K
    assert saved_of(sizes, LINEARS[0], one) == 2 * 14 * K * 4096 * 4096
    assert saved_of(sizes, LINEARS[1], one) == 2 * (6 + 2 * 8) * K * 4096 * 1024, "K and V of all chunks but the last"
    kept = replace(EVERY, linears=((one,) * 5,) * LAYERS)
    assert saved_operations(sizes, kept) == pytest.approx(LAYERS * sum(saved_of(sizes, each, one) for each in LINEARS))
    pass_of_two = replace(kept, inputs=(True,) * 2, attentions=(True,) * 2, linears=kept.linears[:2])
    assert saved_operations(sizes, pass_of_two) == pytest.approx(saved_operations(sizes, kept) / 3)


def test_only_two_policies_keep_any() -> None:
    sizes, plenty = step(), Budgets(200 * GIB, 0)
    for policy in ("attention", "input", "segment"):
        assert [*with_linears(policy, EVERY, sizes, sizes.kv_bytes(2**62), plenty)] == [EVERY]
    for policy in ("auto", "linears"):
        kept = plan_pass(policy, sizes, LAYERS, plenty).kept
        assert linear_share(kept, sizes, range(LAYERS)) == 1.0
    nothing_known = step(model=replace(MODEL, linears=()))
    assert plan_pass("linears", nothing_known, LAYERS, plenty).kept == EVERY


def test_every_output_is_kept_or_refused() -> None:
    sizes = step()
    every = plan_pass("linears", sizes, LAYERS, Budgets(200 * GIB, 0))
    resident, needed = every.kv.device_bytes, every.forecast.device_bytes
    assert needed == forward_bytes(every.kept, sizes.layer_bytes())
    for device in (needed, needed // 2, 0):
        budgets = Budgets(resident + device + under_way_bytes_of(sizes), needed)
        plan = plan_pass("linears", sizes, LAYERS, budgets)
        assert linear_share(plan.kept, sizes, range(LAYERS)) == 1.0
    with pytest.raises(MemoryError, match="Nothing was allocated"):
        plan_pass("linears", sizes, LAYERS, Budgets(resident + needed - 1, 0))
    assert linear_share(plan_pass("auto", sizes, LAYERS, Budgets(resident + needed - 1, 0)).kept, sizes, [0]) < 1


def under_way_bytes_of(sizes: StepSizes) -> int:
    layer = sizes.layer_bytes()
    on_host = replace(EVERY, linears=tuple(tuple(KeptChunks(1, 0) for _ in LINEARS) for _ in range(LAYERS)))
    firsts = [each.chunks[0] for each in layer.linears[0]]
    assert under_way_bytes(on_host, layer) == sum(firsts) + 3 * max(firsts)
    assert under_way_bytes(EVERY, layer) == 0
    return under_way_bytes(on_host, layer)


def on_link(kept: KeptLayers, layer: LayerBytes, at: int) -> int:
    alone = replace(kept, linears=tuple(each if i == at else () for i, each in enumerate(kept.linears)))
    return linear_bytes(alone, layer).host


def test_a_layer_sends_to_the_host_what_crosses_while_it_computes() -> None:
    sizes = step()
    layer, tokens = sizes.layer_bytes(), 32 * K
    device = peak_bytes(EVERY, layer) // 2 + under_way_bytes_of(sizes)
    kept = chosen(sizes, Budgets(device, 500 * GIB))
    operations = 2 * tokens * MODEL.linear_weights + MODEL.attention_forward(tokens * (tokens + 1) / 2)
    crosses = LINK_BYTES_AN_OPERATION * operations
    sent = [on_link(kept, layer, at) + layer.input_total + layer.attention_total for at in range(LAYERS)]
    assert max(sent) <= crosses and max(sent) > 0.4 * crosses
    assert any(on_link(kept, layer, at) for at in range(LAYERS))
    # All of it would take longer than the layer.
    whole = sum(sum(each.chunks) for each in layer.linears[0])
    assert whole + layer.input_total + layer.attention_total > crosses


def test_what_would_cost_time_is_not_done() -> None:
    base = peak_bytes(EVERY, step().layer_bytes())
    streamed, narrow = step(), step_of(4096, 512, model=replace(TINY, linears=((LinearSize("q", 32, 32),) * 2,) * 4))
    there = KeptLayers((True,) * 4, (True,) * 4)
    # K and V have the link; so have the inputs of layers that compute next to nothing; files are slow.
    (found,) = [*with_linears("auto", EVERY, streamed, streamed.kv_bytes(0), Budgets(base, 500 * GIB))]
    assert found == EVERY
    tight = Budgets(peak_bytes(there, narrow.layer_bytes()), 500 * GIB)
    assert [*with_linears("auto", there, narrow, narrow.kv_bytes(2**62), tight)] == [there]
    on_disk = Budgets(base // 4, base // 4, 500 * GIB)
    assert [*with_linears("auto", EVERY, streamed, streamed.kv_bytes(2**62), on_disk)] == [EVERY]


def test_experts_that_cannot_be_on_the_way_leave_the_host_to_others() -> None:
    """Of wide experts a chunk takes more of a tight device than there is, and of the other linears it does not."""
    experts = LinearSize("experts", 4096, 200_000, late=True)
    both = step(64 * K, model=replace(MODEL, linears=((*LINEARS, experts),) * LAYERS))
    alone, sizes = step(64 * K), both.layer_bytes()
    device = 4 * GIB
    assert under_way_bytes(replace(EVERY, linears=((KeptChunks(1),) * 6,) * LAYERS), sizes) > 2 * device
    with_experts, without = (chosen(each, Budgets(device, 60 * GIB)) for each in (both, alone))
    assert linear_bytes(without, alone.layer_bytes()).host > 0
    assert saved_operations(both, with_experts) >= saved_operations(alone, without) > 0
    assert not any(layer[5].kept > layer[5].on_device for layer in with_experts.linears)
    assert 0 < under_way_bytes(with_experts, sizes) == under_way_bytes(without, alone.layer_bytes()) < device
    roomy = chosen(both, Budgets(40 * GIB, 200 * GIB))
    assert any(layer[5].kept for layer in roomy.linears)


def test_an_output_s_own_bytes_count() -> None:
    wide = replace(MODEL, linears=((*LINEARS[:-1], LINEARS[-1]._replace(itemsize=4)),) * LAYERS)
    one, other = step().layer_bytes().linears[0], step(model=wide).layer_bytes().linears[0]
    assert other[:-1] == one[:-1] and sum(other[-1].chunks) == 2 * sum(one[-1].chunks)


def test_a_narrow_window_s_outputs_give_way_to_linears() -> None:
    """An output of attention that sees few keys saves less a byte than those of linears."""
    windowed = step(model=replace(MODEL, windows=(512,) * LAYERS))
    layer, ring = windowed.layer_bytes(), windowed.kv_bytes(2**62).device_bytes
    inputs = LAYERS * layer.input_total

    def check(policy: str) -> None:
        budgets = Budgets(ring + inputs + 2 * layer.attention_total, 0)
        kept = plan_pass(policy, windowed, LAYERS, budgets).kept
        outputs = KeptLayers((True,) * LAYERS, (False,) * (LAYERS - 2) + (True,) * 2)
        done, with_outputs = (pass_work(windowed, each, full=False).done for each in (kept, outputs))
        assert done < with_outputs and linear_share(kept, windowed, range(LAYERS)) > 0.1

    check("auto")
    assert_rejects(check, {"outputs first": "input"})
    # One that sees all before it saves more than any of these, and comes first.
    budgets = Budgets(step().kv_bytes(2**62).device_bytes + inputs + LAYERS * layer.attention_total + 100, 0)
    assert plan_pass("auto", step(), LAYERS, budgets).kept.attention_reruns == 0


def test_plans_stay_within_any_budgets() -> None:
    rng, some = random.Random(0), 0
    for _ in range(60):
        sizes = step(rng.randrange(1, 48) * K + rng.randrange(1000), 8 * K)
        layer, resident = sizes.layer_bytes(), sizes.kv_bytes(2**62).device_bytes
        total = peak_bytes(EVERY, layer)
        budgets = Budgets(resident + rng.randrange(5 * total), rng.choice((0, total, 9 * total)))
        try:
            plan = plan_pass("auto", sizes, LAYERS, budgets)
        except MemoryError:
            continue
        away = under_way_bytes(plan.kept, layer)
        assert plan.forecast.device_bytes + plan.kv.device_bytes + away <= budgets.device
        assert plan.forecast.host_bytes <= budgets.host
        linears = linear_bytes(plan.kept, layer)
        assert linears.device <= plan.forecast.device_bytes and linears.host <= plan.forecast.host_bytes
        some += 0 < linear_share(plan.kept, sizes, range(LAYERS)) < 1
    assert some > 10


@pytest.mark.parametrize("n_tokens", [4 * K, 8 * K, 16 * K])
def test_short_sequences_of_an_8b_model_keep_everything(n_tokens: int) -> None:
    training = training_of(llama_8b(), lora=True)
    machines = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=126 * GIB)
    found = fit(training, machines, n_tokens)
    assert linear_share(found.plan.kept, found.step, range(32)) == 1.0 and found.plan.forecast.host_bytes == 0
    without = fit(replace(training, checkpoints="attention"), machines, n_tokens)
    spared = 2 * n_tokens * 32 * (4096 * (4096 + 1024 + 1024 + 4096 + 2 * 14336))
    assert without.seconds - found.seconds == pytest.approx(spared / GPUS["h100"].matmul)
