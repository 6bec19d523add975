"""Tiers: who gets which place, and a step predicted in numbers against a plain replay of its puts and takes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from hf_fpdt.plan.checkpointing import KeptLayers, linear_bytes
from hf_fpdt.plan.kv_bytes import KVBytes
from hf_fpdt.plan.layer_bytes import LayerBytes
from hf_fpdt.plan.rehearsal import Forecast, Rehearsal, forecast
from hf_fpdt.plan.tiers import Budgets, BufferPool, ExistingBuffers, ForwardOrder, TierAllocator
from hf_fpdt.units import PAGE, page_rounded
from tests.helpers.replay import replayed
from tests.helpers.stores import NO_LIMIT, random_kept, with_linears
from tests.helpers.support import assert_rejects


def test_checkpoints_leave_to_keys_and_values_what_is_theirs() -> None:
    tiers = TierAllocator(Budgets(device=0, host=3 * PAGE, disk=10 * PAGE), plain_pool(3 * PAGE), plain_pool(2 * PAGE))
    places = [tiers.place(PAGE) for _ in range(4)]
    assert [place and place.tier for place in places] == ["host"] * 3 + ["disk"]
    kv = [tiers.place_kv(PAGE) for _ in range(3)]
    assert kv[0] is not None and kv[1] is not None and kv[2] is None
    tiers.leave(kv[0])
    again = tiers.place(PAGE)
    assert again is not None and again.tier == "disk", "nor a buffer of theirs that is free"
    assert tiers.place_kv(PAGE) is not None


def plain_pool(limit: int) -> BufferPool[list[int]]:
    return BufferPool(lambda size: [size], limit)


def test_buffers_have_the_size_asked_for_in_whole_pages() -> None:
    assert [page_rounded(n) for n in (0, 1, PAGE - 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, PAGE, 2 * PAGE]
    pool = plain_pool(NO_LIMIT)
    for nbytes in (1, PAGE, PAGE + 1, 3 * 2**20 + 5):
        taken = pool.take(nbytes)
        assert taken == (page_rounded(nbytes), [page_rounded(nbytes)])
    assert pool.nbytes == pool.used_bytes == 4 * PAGE + page_rounded(3 * 2**20 + 5)


def test_the_smallest_free_buffer_that_holds_it_is_used_again_if_it_is_not_much_longer() -> None:
    pool = plain_pool(NO_LIMIT)
    buffers = {pages: pool.take(pages * PAGE) for pages in (8, 2, 4)}
    for taken in buffers.values():
        assert taken is not None
        pool.give(*taken)
    assert pool.used_bytes == 0
    for pages, expected in ((3, 4), (2, 2), (6, 8), (1, 1)):
        taken = pool.take(pages * PAGE)
        assert taken is not None and taken[0] == expected * PAGE
    assert pool.made == Counter({8 * PAGE: 1, 4 * PAGE: 1, 2 * PAGE: 1, PAGE: 1})
    pool.clear()
    assert (pool.nbytes, pool.used_bytes) == (0, 0)


def test_a_much_longer_buffer_is_used_only_where_no_new_one_may_be_made() -> None:
    pool = plain_pool(9 * PAGE)
    pool.give(*pool.take(8 * PAGE) or (0, []))
    first, second = pool.take(PAGE), pool.take(PAGE)
    assert first is not None and first[0] == PAGE
    assert second is not None and second[0] == 8 * PAGE
    assert pool.take(PAGE) is None


def test_a_pool_never_holds_more_than_its_limit_and_never_hands_a_buffer_out_twice() -> None:
    rng, limit = random.Random(0), 40 * PAGE
    pool, out = plain_pool(limit), list[tuple[int, list[int]]]()
    refused = 0
    for _ in range(2000):
        if out and rng.random() < 0.45:
            pool.give(*out.pop(rng.randrange(len(out))))
        else:
            nbytes = rng.randrange(1, 9 * PAGE)
            taken = pool.take(nbytes)
            if taken is None:
                refused += 1
                assert pool.nbytes + page_rounded(nbytes) > limit
            else:
                assert taken[0] >= nbytes and all(taken[1] is not other for _, other in out)
                out.append(taken)
        assert pool.used_bytes == sum(size for size, _ in out) <= pool.nbytes <= limit
    assert refused > 50
    exact = plain_pool(2 * PAGE)
    assert exact.take(PAGE + 1) is not None and exact.take(1) is None


def test_a_buffer_made_elsewhere_is_free_from_then_on() -> None:
    pool = plain_pool(PAGE)
    pool.add(PAGE, [7])
    assert (pool.nbytes, pool.used_bytes) == (PAGE, 0)
    assert pool.take(5) == (PAGE, [7]) and pool.used_bytes == PAGE and pool.take(5) is None


def test_an_entry_goes_to_the_first_tier_with_room_and_every_byte_is_counted() -> None:
    tiers = TierAllocator(Budgets(device=100, host=2 * PAGE, disk=50), plain_pool(2 * PAGE))
    asked = [(60, "device"), (41, "host"), (40, "device"), (PAGE, "host"), (30, "disk"), (21, None), (20, "disk")]
    places = []
    for nbytes, tier in asked:
        place = tiers.place(nbytes)
        assert (place and place.tier) == tier
        if place is not None:
            assert place.nbytes == nbytes and (place.buffer is not None) == (tier == "host")
            places.append(place)
    assert tiers.used == Counter(device=100, host=41 + PAGE, disk=50) == tiers.peak
    for place in places:
        tiers.leave(place)
    assert not any(tiers.used.values()) and tiers.pool.used_bytes == 0
    assert tiers.peak == Counter(device=100, host=41 + PAGE, disk=50)
    last = tiers.place(10, ("disk", "host"))
    assert last is not None and last.tier == "disk"


@pytest.mark.parametrize("disk", [0, 40])
def test_the_last_bytes_of_a_forward_pass_go_to_the_device_and_the_first_to_files(disk: int) -> None:
    budgets = Budgets(device=30, host=50, disk=disk)
    order = ForwardOrder(80 + disk, budgets)
    firsts = [order.next(10)[0] for _ in range((80 + disk) // 10)]
    assert firsts == ["disk"] * (disk // 10) + ["host"] * 5 + ["device"] * 3
    assert ForwardOrder(30, budgets).next(30)[0] == "device", "all goes to the device where all fits"


def random_step(rng: random.Random) -> tuple[KeptLayers, LayerBytes, KVBytes, Budgets, ExistingBuffers]:
    """Chunks of one length but the last; few distinct sizes, so that buffers are used again."""
    chunks, layers = rng.randrange(1, 6), rng.randrange(1, 7)
    part, last = rng.randrange(1, 5) * PAGE, rng.randrange(1, 2 * PAGE)
    lengths = [part] * (chunks - 1) + [min(last, part)]
    scaled = [tuple(n * factor // 4 for n in lengths) for factor in (4, 6, 1, 2, 4)]
    kv = KVBytes(scaled[3], scaled[4], rng.randrange(chunks + 1), rng.randrange(chunks + 1))
    if rng.random() < 0.5:
        kv = replace(kv, value_parts=scaled[2], value_grads=scaled[3])  # values half as wide as keys
    if rng.random() < 0.5:
        kv = replace(kv, windowed=tuple(rng.random() < 0.7 for _ in range(layers)))
    sizes, kept = LayerBytes(scaled[0], scaled[1], scaled[2]), random_kept(rng, layers)
    if rng.random() < 0.4:
        attends = tuple(rng.random() < 0.4 for _ in range(layers))
        states = tuple(
            {"conv 0": 100, "recurrent 0": rng.choice((PAGE, 900))} if rng.random() < 0.7 else {} for _ in attends
        )
        kv = replace(kv, windowed=tuple(not each for each in attends))
        sizes = replace(sizes, attends=attends, states=states)
        attentions = tuple(out or not each for out, each in zip(kept.attentions, attends, strict=True))
        kept = replace(kept, attentions=attentions)
    if rng.random() < 0.5:
        kept, sizes = with_linears(rng, kept, sizes, list(scaled[2]))
    total = layers * (sizes.input_total + sizes.attention_total) + sizes.all_states + linear_bytes(kept, sizes).total
    budgets = Budgets(rng.randrange(total), rng.randrange(3 * total // 2) + 4 * PAGE, rng.choice((0, total)))
    have = {page_rounded(rng.choice(lengths)): rng.randrange(4) for _ in range(rng.randrange(3))}
    return kept, sizes, kv, budgets, ExistingBuffers(have)


def assert_predicted(tell: Callable[..., Forecast | None]) -> None:
    rng, fits = random.Random(6), 0
    for _ in range(500):
        case = random_step(rng)
        truth = replayed(*case)
        fits += truth is not None
        assert tell(*case) == truth, case
    assert 100 < fits < 450


def test_a_forecast_is_what_a_replay_of_the_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_predicted(forecast)
    assert_rejects(
        assert_predicted,
        {
            "gradients forgotten": lambda k, s, kv, *a: forecast(k, s, replace(kv, grads=(0,) * len(kv.grads)), *a),
            "K, V forgotten": lambda k, s, kv, *a: forecast(k, s, replace(kv, parts=(0,) * len(kv.parts)), *a),
            "values as wide as keys": lambda k, s, kv, *a: forecast(k, s, replace(kv, value_parts=()), *a),
            "gradients of values too": lambda k, s, kv, *a: forecast(k, s, replace(kv, value_grads=()), *a),
            "windows forgotten": lambda k, s, kv, *a: forecast(k, s, replace(kv, windowed=()), *a),
            "lse forgotten": lambda k, s, *a: forecast(k, replace(s, lses=(0,) * len(s.lses)), *a),
            "states forgotten": lambda k, s, *a: forecast(k, replace(s, states=()), *a),
            "every layer attends": lambda k, s, *a: forecast(k, replace(s, attends=()), *a),
            "linears forgotten": lambda k, s, *a: forecast(replace(k, linears=()), s, *a),
            "linears half as long": lambda k, s, *a: forecast(k, half_as_long(s), *a),
            "buffers that exist forgotten": lambda k, s, kv, budgets, _: forecast(k, s, kv, budgets),
        },
    )
    monkeypatch.setattr(Rehearsal, "_close", lambda step, held: None)
    assert_rejects(assert_predicted, {"K, V never given back": forecast})


def half_as_long(sizes: LayerBytes) -> LayerBytes:
    """Outputs of linears half as long."""
    half = (tuple(each._replace(chunks=tuple(n // 2 for n in each.chunks)) for each in kind) for kind in sizes.linears)
    return replace(sizes, linears=tuple(half))


def total(counts: Mapping[int, int]) -> int:
    return sum(size * count for size, count in counts.items())


def predicted(n_tokens: int, host: int, have: ExistingBuffers | None = None) -> Forecast | None:
    """Three layers in chunks of 1,024 tokens, 64 bytes a token, all on the host."""
    lengths = [min(1024, n_tokens - start) for start in range(0, n_tokens, 1024)]
    inputs, outs, lses = (tuple(n * width for n in lengths) for width in (64, 64, 2))
    sizes = LayerBytes(inputs, outs, lses)
    kv = KVBytes(tuple(16 * n for n in lengths), tuple(32 * n for n in lengths), 0, 0)
    return forecast(KeptLayers((True,) * 3, (True,) * 3), sizes, kv, Budgets(0, host), have)


def test_another_length_needs_only_the_buffers_that_are_not_there() -> None:
    first = predicted(8000, NO_LIMIT)
    assert first is not None
    have = ExistingBuffers(first.new_buffers, first.new_kv_buffers)
    assert first.host_bytes == total(first.new_buffers) + total(first.new_kv_buffers)
    for shorter in (8000, 7168, 4096, 4000, 1024, 1):
        again = predicted(shorter, NO_LIMIT, have)
        assert again is not None and again.new_buffers == again.new_kv_buffers == {}
        assert again.host_bytes == first.host_bytes
    longer, alone = predicted(9 * 1024, NO_LIMIT, have), predicted(9 * 1024, NO_LIMIT)
    assert longer is not None and alone is not None
    new = total(longer.new_buffers) + total(longer.new_kv_buffers)
    assert longer.host_bytes == first.host_bytes + new and 0 < new < alone.host_bytes / 4
    assert predicted(9 * 1024, longer.host_bytes, have) == longer
    assert predicted(8000, first.host_bytes) == first
    # A little less may do, with buffers longer than they need be; what is handed out at once is the bound.
    for less in (0.75, 0.5):
        assert predicted(8000, int(less * first.host_bytes)) is None
