"""Kept tensors on all three tiers: the same four calls, the same values, and every byte given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fpdt.memory.entries import DeviceEntry, DiskTierEntry, Entry, HostEntry
from hf_fpdt.memory.files import DiskStaging
from hf_fpdt.memory.transfers import Copy, Fetch, Transfers, typed
from hf_fpdt.plan.tiers import LOOKAHEAD, STAGING_BUFFERS, Tier, TierAllocator
from tests.helpers.stores import CPU, NO_LIMIT, tiers, transfers
from tests.helpers.support import assert_rejects

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
LONGEST = 9000


class Bench:
    """Tiers, a file, and entries on any of them."""

    def __init__(self, folder: Path, moves: Transfers | None = None) -> None:
        self.moves = transfers() if moves is None else moves
        self.allocator: TierAllocator[Tensor] = tiers(device=NO_LIMIT, disk=NO_LIMIT)
        self.files = DiskStaging(str(folder), self.moves)
        self.files.stage_for(LONGEST)

    def keep(self, value: Tensor, tier: Tier) -> Entry:
        place = self.allocator.place(value.numel() * value.element_size(), (tier,))
        assert place is not None
        if tier == "device":
            return DeviceEntry(value, place, self.allocator, "'out' of chunk 3")
        if tier == "host":
            return HostEntry(value, place, self.allocator, self.moves)
        return DiskTierEntry(value, place, self.allocator, self.files)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.files.close()


def values(count: int = 3) -> list[Tensor]:
    """Odd shapes, several dtypes, memory in another order."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    made = [torch.randn(2, 11, 7 + i).to(dtypes[i % 3]) for i in range(count)]
    return [made[0].transpose(1, 2), *made[1:]]


def assert_keeps(bench: Bench, tier: Tier, keep: Callable[[Tensor, Tier], Entry]) -> None:
    """Any order of the calls, entries one beside the other."""
    kept = [(keep(value.clone(), tier), value) for value in values()]
    for entry, value in kept:
        entry.begin()
        entry.begin()
        assert torch.equal(entry.get(), value) and entry.get().dtype == value.dtype
    for entry, value in reversed(kept):
        entry.settle()
        assert torch.equal(entry.get(), value), "read again, without a begin"
        assert torch.equal(entry.get(), value)
        entry.settle()
    assert bench.allocator.used[tier] == sum(value.numel() * value.element_size() for _, value in kept)
    for entry, _ in kept:
        entry.free()
    assert not any(bench.allocator.used.values()) and bench.allocator.pool.used_bytes == 0
    assert bench.files.file.used_bytes == 0


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_gives_back_what_was_kept_and_its_room(bench: Bench, tier: Tier) -> None:
    assert_keeps(bench, tier, bench.keep)

    class SecondReadIsEmpty:
        def __init__(self, entry: Entry) -> None:
            self.entry, self.reads = entry, 0
            self.begin, self.settle, self.free = entry.begin, entry.settle, entry.free

        def get(self) -> Tensor:
            self.reads += 1
            return self.entry.get() if self.reads < 2 else torch.zeros_like(self.entry.get())

    class NeverFreed(SecondReadIsEmpty):
        def get(self) -> Tensor:
            return self.entry.get()

        def __init__(self, entry: Entry) -> None:
            super().__init__(entry)
            self.free = lambda: None

    def never_written(value: Tensor, tier: Tier) -> Entry:
        return bench.keep(torch.full_like(value, float("nan")), tier)

    assert_rejects(
        lambda keep: assert_keeps(bench, tier, keep),
        {
            "never written": never_written,
            "read once": lambda value, tier: SecondReadIsEmpty(bench.keep(value, tier)),
            "never freed": lambda value, tier: NeverFreed(bench.keep(value, tier)),
        },
    )


@pytest.mark.parametrize("tier", TIERS[1:])
def test_what_is_copied_may_change_at_its_source(bench: Bench, tier: Tier) -> None:
    value = torch.randn(5, 3)
    entry, before = bench.keep(value, tier), value.clone()
    entry.settle()
    value.fill_(7)
    assert torch.equal(entry.get(), before)
    got = entry.get()
    got.fill_(9)
    assert torch.equal(entry.get(), before), "nor does whoever reads it change it"


def test_an_entry_on_the_device_is_the_tensor_itself_and_must_not_change(bench: Bench) -> None:
    whole = torch.randn(6, 4)
    entry = bench.keep(whole[:2], "device")
    assert entry.get().data_ptr() == whole.data_ptr()
    whole[5] = 1  # shares the memory, so it counts as a change
    with pytest.raises(RuntimeError, match="'out' of chunk 3 was changed in place after the forward pass.*copy"):
        entry.get()


@pytest.mark.parametrize("tier", TIERS)
def test_an_entry_may_be_freed_with_a_fetch_under_way(bench: Bench, tier: Tier) -> None:
    first = bench.keep(torch.ones(2000), tier)
    first.begin()
    first.free()
    assert not any(bench.allocator.used.values()) and bench.files.file.used_bytes == 0
    second = bench.keep(torch.full((2000,), 2.0), tier)
    assert torch.equal(second.get(), torch.full((2000,), 2.0))
    assert bench.allocator.pool.nbytes <= 8192, "the buffer was used again"


def test_staging_buffers_are_used_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.files.pinned, "buffer", lambda nbytes: pytest.fail("one more buffer"))
    data = [torch.randn(1 + 111 * i) for i in range(5 * STAGING_BUFFERS // 2)]
    kept = [bench.keep(value, "disk") for value in data]
    for _ in range(3):
        for i, (entry, value) in enumerate(zip(kept, data, strict=True)):
            for ahead in kept[i : i + LOOKAHEAD]:
                ahead.begin()
            assert torch.equal(entry.get(), value)
        kept.append(bench.keep(data[0], "disk"))  # writes between reads
        assert torch.equal(kept.pop().get(), data[0])


def test_longer_entries_than_before_get_longer_staging(bench: Bench) -> None:
    short = [bench.keep(torch.full((10 + i,), float(i)), "disk") for i in range(STAGING_BUFFERS + 2)]
    for entry in short[:2]:
        entry.begin()
    bench.files.stage_for(4 * LONGEST)
    bench.files.stage_for(LONGEST)  # of a shorter step: there is nothing to do
    long = [bench.keep(torch.full((LONGEST - i,), float(i)), "disk") for i in range(2 * STAGING_BUFFERS)]
    for i in range(STAGING_BUFFERS):
        assert torch.equal(short[i].get(), torch.full((10 + i,), float(i)))
        assert torch.equal(long[i].get(), torch.full((LONGEST - i,), float(i)))
        assert torch.equal(long[-1 - i].get(), torch.full((LONGEST + 1 + i - len(long),), float(len(long) - 1 - i)))


def test_reads_that_nobody_took_do_not_use_up_the_staging(bench: Bench) -> None:
    kept = [bench.keep(torch.full((50,), float(i)), "disk") for i in range(2 * STAGING_BUFFERS)]
    for entry in kept:
        entry.begin()
    last = bench.keep(torch.full((50,), -1.0), "disk")
    for i, entry in enumerate(kept):
        assert torch.equal(entry.get(), torch.full((50,), float(i)))
    assert torch.equal(last.get(), torch.full((50,), -1.0))


class Late(Transfers):
    """A device whose copies in happen when the test says so, as a GPU's do behind a long kernel."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.pending: list[Callable[[], Any]] = []
        self.hold = False

    def to_device(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, after: Copy | None) -> Fetch:
        if not self.hold:
            return super().to_device(buffer, shape, dtype, after)
        filled, source, done = torch.zeros(shape, dtype=dtype), typed(buffer, shape, dtype), list[bool]()

        class Event:
            query = staticmethod(lambda: bool(done))

        def arrive() -> None:
            filled.copy_(source)
            done.append(True)

        self.pending.append(arrive)
        fetch = Fetch(filled, source, None)
        fetch.copy.event = Event
        fetch.copy.settle = lambda: None  # type: ignore[method-assign]  # there is no stream that could wait
        return fetch


def test_a_file_does_not_fill_a_staging_buffer_that_the_device_still_reads(tmp_path: Path) -> None:
    late = Late()
    bench = Bench(tmp_path, late)
    data = [torch.full((2000,), float(i)) for i in range(2 * STAGING_BUFFERS)]
    kept = [bench.keep(value, "disk") for value in data]
    for entry, value in zip(kept, data, strict=True):
        assert torch.equal(entry.get(), value)  # all is written, all staging is free
    late.hold = True
    got = [entry.get() for entry in kept[:STAGING_BUFFERS]]
    for entry in kept[STAGING_BUFFERS:]:
        entry.begin()
    time.sleep(0.1)  # long enough for threads that do not wait
    for arrive in late.pending:
        arrive()
    late.hold = False
    for tensor, value in zip(got, data, strict=False):
        assert torch.equal(tensor, value)
    for entry, value in zip(kept[STAGING_BUFFERS:], data[STAGING_BUFFERS:], strict=True):
        assert torch.equal(entry.get(), value)
    bench.files.close()


def test_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    entry = bench.keep(torch.randn(100), "disk")
    bench.files.close()
    bench.files.close()
    assert not list(tmp_path.iterdir())
    entry.free()  # who holds it may go after the file
    assert not any(bench.allocator.used.values())
