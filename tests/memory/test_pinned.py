"""Host memory and the buffers cut out of it, on the CPU: none overlap, none is lost, and little is pinned anew."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import psutil
import pytest
import torch
from torch import Tensor

from hf_fpdt.memory import pinned as pinned_memory
from hf_fpdt.memory.pinned import Cuts, PinnedMemory, cuts_of
from hf_fpdt.memory.transfers import typed
from hf_fpdt.units import PAGE
from tests.helpers.stores import CPU

NO_LIMIT = 2**62


def assert_apart(buffers: Sequence[Tensor]) -> None:
    """Each on a page of its own, and no two on one."""
    places = sorted((buffer.data_ptr(), buffer.numel()) for buffer in buffers)
    assert all(start % PAGE == 0 for start, _ in places)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))


def test_buffers_go_into_the_first_region_with_room_and_the_rest_is_pinned() -> None:
    cuts = cuts_of([5, 4, 3, 2, 2], [(6, 0), (9, 3), (4, 4)], NO_LIMIT)
    assert cuts.parts == {0: [5], 1: [4, 2], 2: []} and cuts.rest == [3, 2]
    assert cuts_of([7], [], NO_LIMIT) == Cuts({}, [7]) and cuts_of([], [(6, 2)], 1) == Cuts({0: []}, [])


def test_regions_go_that_would_be_left_empty_and_only_as_many_as_it_takes() -> None:
    regions = [(10, 0), (10, 0), (10, 0), (8, 1)]
    assert cuts_of([9, 9], regions, 38).parts.keys() == {0, 1, 2, 3}, "all fits"
    assert cuts_of([12, 9, 9], regions, 40) == Cuts({0: [9], 1: [9], 3: []}, [12]), "the empty one goes"
    assert cuts_of([12, 9, 9], regions, 39) == Cuts({1: [9], 3: []}, [12, 9]), "and one that is left with most"
    assert cuts_of([20], [(10, 0), (10, 4)], 25) == Cuts({1: []}, [20]), "what has buffers stays, whatever the limit"
    assert cuts_of([20, 10], [(10, 0), (10, 4)], 25) == Cuts({0: [10], 1: []}, [20]), "nothing is won by a full one"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_within_the_limit_is_pinned_within_it(seed: int) -> None:
    rng = random.Random(seed)
    regions = [(rng.randrange(1, 30), 0) for _ in range(rng.randrange(1, 9))]
    limit = sum(length for length, _ in regions)
    sizes = [rng.randrange(1, 12)]
    while sum(sizes) < limit:
        sizes.append(rng.randrange(1, 12))
    wanted = sorted(sizes[:-1], reverse=True)
    cuts = cuts_of(wanted, regions, limit)
    assert sum(regions[number][0] for number in cuts.parts) + sum(cuts.rest) <= limit
    assert all(sum(part) <= regions[number][0] for number, part in cuts.parts.items())
    assert Counter(wanted) == sum(map(Counter, cuts.parts.values()), Counter(cuts.rest))


def test_memory_is_cut_anew_without_pinning_any() -> None:
    pinned = PinnedMemory(CPU)
    first = [buffer for _, buffer in pinned.buffers({6 * PAGE: 2, PAGE: 4})]
    seconds, held = pinned.seconds, pinned.nbytes
    assert held == 16 * PAGE
    pinned.recut()
    again = [buffer for _, buffer in pinned.buffers({5 * PAGE: 2, 2 * PAGE: 3})]
    assert_apart(again)
    assert pinned.nbytes == held and pinned.seconds == seconds
    assert {buffer.untyped_storage().data_ptr() for buffer in again} == {first[0].untyped_storage().data_ptr()}
    assert pinned.gap_bytes == 0 and sum(buffer.numel() for buffer in again) == held


def test_buffers_in_use_stay_where_they_are() -> None:
    pinned = PinnedMemory(CPU)
    pinned.limit = 24 * PAGE
    ((_, whole),) = pinned.buffers({16 * PAGE: 1})
    pinned.recut()
    ((_, held),) = pinned.buffers({3 * PAGE: 1})
    held.fill_(7)
    assert pinned.gap_bytes == 13 * PAGE
    more = [pinned.buffer(8 * PAGE), pinned.buffer(5 * PAGE), pinned.buffer(8 * PAGE)]
    assert_apart([held, *more])
    for buffer in more:
        buffer.fill_(9)
    assert (held == 7).all() and pinned.nbytes == 24 * PAGE == whole.numel() + 8 * PAGE


def test_an_empty_region_is_given_up_for_what_does_not_fit_in_it() -> None:
    pinned = PinnedMemory(CPU)
    pinned.limit = 10 * PAGE
    pinned.buffer(4 * PAGE), pinned.buffer(5 * PAGE)
    pinned.recut()
    assert pinned.buffer(6 * PAGE).numel() == 6 * PAGE and pinned.nbytes == 10 * PAGE
    assert (pinned.buffer(4 * PAGE).numel(), pinned.gap_bytes) == (4 * PAGE, 0)


def test_buffers_start_on_a_page_and_have_whole_pages() -> None:
    pinned = PinnedMemory(CPU)
    for nbytes in (1, PAGE, PAGE + 1, 3 * PAGE - 1):
        buffer = pinned.buffer(nbytes)
        assert (buffer.dtype, buffer.dim(), buffer.data_ptr() % PAGE) == (torch.uint8, 1, 0)
        assert buffer.numel() == -(-nbytes // PAGE) * PAGE
    assert pinned.seconds > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_nobody_wrote_is_nan_in_every_floating_type(dtype: torch.dtype) -> None:
    pinned = PinnedMemory(CPU)
    for buffer in (pinned.buffer(PAGE), *(made for _, made in pinned.buffers({PAGE: 3}))):
        assert typed(buffer, torch.Size((8, 17)), dtype).isnan().all()


def test_many_buffers_come_from_few_regions_each_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "REGION_BYTES", 8 * PAGE)
    counts, pinned = {PAGE: 7, 3 * PAGE: 4, 10 * PAGE: 2}, PinnedMemory(CPU)
    made = list(pinned.buffers(counts))
    regions = [region.memory.numel() for region in pinned._regions]
    assert {size: [s for s, _ in made].count(size) for size in counts} == counts
    assert all(buffer.numel() == size for size, buffer in made)
    assert all(nbytes <= 8 * PAGE or nbytes == 10 * PAGE for nbytes in regions), "one that is longer stands alone"
    assert sum(regions) == pinned.nbytes == sum(size * count for size, count in counts.items()) and len(regions) == 5
    assert_apart([buffer for _, buffer in made])
    assert pinned.gap_bytes == 0 and list(PinnedMemory(CPU).buffers({})) == []


def test_released_memory_goes_back_but_for_what_somebody_holds() -> None:
    pinned, process = PinnedMemory(CPU), psutil.Process()
    before, nbytes = process.memory_info().rss, 64 * 2**20
    kept = pinned.buffer(PAGE).fill_(5)
    pinned.buffer(nbytes)
    assert process.memory_info().rss - before > nbytes // 2
    pinned.release()
    assert process.memory_info().rss - before < nbytes // 2
    assert (kept == 5).all()
    pinned.release()


def test_memory_that_is_simply_dropped_is_given_back() -> None:
    pinned = PinnedMemory(CPU)
    regions = pinned._regions
    kept = pinned.buffer(PAGE)
    assert len(regions) == 1
    del pinned
    assert not regions and kept.numel() == PAGE
