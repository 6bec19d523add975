"""What a pass keeps by (layer, chunk): handed over once, read ahead, counted to the byte, given back."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_fpdt.layout.chunks import Chunk
from hf_fpdt.memory.checkpoints import CheckpointStore, LayerCheckpoint
from hf_fpdt.memory.entries import DeviceEntry, DiskTierEntry, HostEntry
from hf_fpdt.memory.files import DiskStaging
from hf_fpdt.memory.transfers import Transfers
from hf_fpdt.plan.checkpointing import KeptLayers, forward_bytes, linear_bytes, peak_bytes
from hf_fpdt.plan.model_sizes import LinearSize
from hf_fpdt.plan.tiers import LOOKAHEAD, STAGING_BUFFERS
from hf_fpdt.units import PAGE, page_rounded
from tests.helpers.stores import CPU, NO_LIMIT, TINY, FakeRun, checkpoint_store, step_of
from tests.helpers.support import assert_rejects

# Entries of whole pages, but for lse.
WIDE = replace(TINY, hidden=512, head_dim=128, value_dim=0)
STEP = step_of(20, 8, model=WIDE)
CHUNKS = STEP.plan.chunks
SIZES = STEP.layer_bytes()
RESIDENT = STEP.kv_bytes(NO_LIMIT).device_bytes
NAMES = ("input", "out", "lse")
Value = tuple[LayerCheckpoint, str, int, Tensor]


def value_of(name: str, chunk: int, number: float) -> Tensor:
    tokens = CHUNKS[chunk].stop - CHUNKS[chunk].start
    shape = {"input": (1, tokens, 512), "out": (1, tokens, 4, 128), "lse": (1, 4, tokens)}[name]
    return torch.full(shape, number)


def joined(store: CheckpointStore, run: FakeRun) -> tuple[LayerCheckpoint, FakeRun | None]:
    """The checkpoint of a layer that enters its pass, and the run below."""
    return store.pass_of(run.index, run.step, CPU, False).enter(run)


def forward_pass(store: CheckpointStore) -> tuple[list[FakeRun], list[LayerCheckpoint], list[Value]]:
    """All layers forward; every value has a number of its own."""
    runs = [FakeRun(index, STEP) for index in range(STEP.model.layers)]
    kept, values = [], list[Value]()
    for run in runs:
        kept.append(joined(store, run)[0])
        for chunk in CHUNKS:
            for name in NAMES:
                if kept[-1].keeps_input if name == "input" else kept[-1].keeps_attention:
                    value = value_of(name, chunk.index, float(len(values)))
                    kept[-1].put(name, chunk, value)
                    values.append((kept[-1], name, chunk.index, value.clone()))
            kept[-1].settle()
    return runs, kept, values


def budgets(tmp_path: Path) -> list[dict[str, object]]:
    """All on one tier, and spread over all of them."""
    whole = 4 * (SIZES.input_total + SIZES.attention_total)
    files = str(tmp_path)
    return [
        {"device": NO_LIMIT},
        {"device": 0},
        {"device": whole // 3},
        {"device": RESIDENT + 40_000, "host": 24 * PAGE + STAGING_BUFFERS * SIZES.longest, "disk_dir": files},
        {"device": 4000, "host": 80 * PAGE, "policy": "auto"},
    ]


@pytest.mark.parametrize("case", range(5))
def test_what_was_put_is_taken_once_and_its_bytes_go_back(tmp_path: Path, case: int) -> None:
    with checkpoint_store(**budgets(tmp_path)[case]) as store:  # type: ignore[arg-type]
        runs, kept, values = forward_pass(store)
        (plan,) = store.plans.values()
        used = store.used_bytes()
        assert sum(used[tier] for tier in ("device", "host", "disk")) == forward_bytes(plan.kept, SIZES)
        assert used["pinned"] == plan.forecast.host_bytes
        for checkpoint, name, chunk, value in reversed(values):
            assert checkpoint.holds(name, CHUNKS[chunk])
            assert torch.equal(checkpoint.peek(name, CHUNKS[chunk]), value)
            assert torch.equal(checkpoint.take(name, CHUNKS[chunk]), value)
            assert not checkpoint.holds(name, CHUNKS[chunk])
            for again in (checkpoint.take, checkpoint.peek):
                with pytest.raises(
                    RuntimeError, match=f"{name!r} of chunk {chunk} was used before.*forward pass again"
                ):
                    again(name, CHUNKS[chunk])
        assert store.used_bytes() == {"device": 0, "host": 0, "disk": 0, "pinned": used["pinned"]}
        assert len(runs) == len(kept) == 4


def test_tiers_hold_what_the_budgets_say(tmp_path: Path) -> None:
    def assert_spread(case: int) -> None:
        with checkpoint_store(**budgets(tmp_path)[case]) as store:  # type: ignore[arg-type]
            _, kept, _ = forward_pass(store)
            used = store.used_bytes()
            assert 0 < used["device"] <= 40_000 and used["host"] > 0 and used["disk"] > 0
            entries = [list(checkpoint.entries(*NAMES, chunks=CHUNKS)) for checkpoint in kept]
            assert isinstance(entries[0][0], DiskTierEntry), "the first layers are needed last"
            assert isinstance(entries[-1][-1], DeviceEntry), "the last layers are needed first"

    assert_spread(3)
    assert_rejects(assert_spread, {"device alone": 0, "host alone": 1, "no files": 2})


@pytest.mark.parametrize(("case", "tier"), [(1, "to_host"), (3, "write")])
def test_a_copy_that_fails_leaves_no_place_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: int, tier: str
) -> None:
    """Out of memory, or a full disk: who catches it may run another step."""

    def fail(*_: Tensor) -> None:
        raise torch.OutOfMemoryError("none left")

    with checkpoint_store(**budgets(tmp_path)[case]) as store:  # type: ignore[arg-type]
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(Transfers if tier == "to_host" else DiskStaging, tier, fail)
            forward_pass(store)
        gc.collect()
        assert not any(store.used_bytes()[name] for name in ("device", "host", "disk"))
        forward_pass(store)


def test_a_step_without_host_buffers_has_its_staging_ready(tmp_path: Path) -> None:
    """K and V on the device, every checkpoint in the file."""
    longest = page_rounded(STEP.layer_bytes().longest)
    with checkpoint_store(device=RESIDENT, host=STAGING_BUFFERS * longest, disk_dir=str(tmp_path)) as store:
        joined(store, FakeRun(0, STEP))
        assert (
            store._tiers.memory is not None
            and store._tiers.memory.files is not None
            and not store.used_bytes()["pinned"]
        )
        assert store._tiers.memory.files.pinned.nbytes == STAGING_BUFFERS * longest


def test_a_pass_that_is_dropped_gives_its_bytes_back() -> None:
    with checkpoint_store(device=4000) as store:
        held = forward_pass(store)
        assert store.used_bytes()["host"] > 0
        del held
        gc.collect()
        used = store.used_bytes()
        assert used["device"] == used["host"] == 0 < used["pinned"]


def test_layers_join_the_pass_of_the_layer_below() -> None:
    with checkpoint_store() as store:
        runs = [FakeRun(index, STEP) for index in range(4)]
        assert [joined(store, run)[1] for run in runs] == [None, *runs[:3]]
        assert joined(store, FakeRun(0, STEP))[1] is None, "the next forward pass"
        other = FakeRun(1, step_of(16, 8, model=WIDE))
        assert joined(store, other)[1] is None, "another length is another pass"
        assert joined(store, FakeRun(3, other.step))[1] is None, "a layer between has no backward pass"
        assert {layers for _, layers in store.plans} == {4, 3, 1}
        del runs, other
        assert joined(store, FakeRun(2, STEP))[1] is None, "who was below is gone"


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[HostEntry]:
    begun: list[HostEntry] = []
    begin = HostEntry.begin

    def counted(entry: HostEntry) -> None:
        if entry._fetch is None:
            begun.append(entry)
        begin(entry)

    monkeypatch.setattr(HostEntry, "begin", counted)
    return begun


def test_reads_to_come_are_fetched_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = count_fetches(monkeypatch)
    with checkpoint_store() as store:
        _, kept, _ = forward_pass(store)
        top = kept[-1]
        reads = list(top.entries("input", "out", "lse", chunks=reversed(CHUNKS)))
        top.expect(reads)
        assert begun == reads[:LOOKAHEAD]
        order = [(name, chunk) for chunk in reversed(CHUNKS) for name in NAMES]
        for count, (name, chunk) in enumerate(order, 1):
            top.take(name, chunk)
            assert begun == reads[: LOOKAHEAD + count], "each was fetched once, and as early as it may be"
        assert len(begun) == len(reads)


def test_an_unexpected_read_ends_the_reads_ahead_and_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = count_fetches(monkeypatch)
    with checkpoint_store() as store:
        _, kept, values = forward_pass(store)
        kept[2].expect(kept[2].entries("input", chunks=CHUNKS))
        assert len(begun) == 3
        kept[1].take("out", CHUNKS[2])
        kept[1].expect(kept[1].entries("input", "lse", chunks=CHUNKS))
        kept[0].take("lse", CHUNKS[0])
        count = len(begun)
        kept[1].take("input", CHUNKS[0])
        assert len(begun) == count, "it had been fetched, and nothing is fetched ahead any more"
        for checkpoint, name, chunk, value in values:
            if checkpoint.holds(name, CHUNKS[chunk]):
                assert torch.equal(checkpoint.take(name, CHUNKS[chunk]), value)
        assert store.used_bytes()["host"] == 0


@pytest.mark.parametrize("device", [NO_LIMIT, RESIDENT + SIZES.inputs[2] + SIZES.attention_total])
def test_parts_of_a_longer_tensor_are_copied_where_only_some_stay_on_the_device(device: int) -> None:
    with checkpoint_store(device=device) as store:
        runs = [FakeRun(index, STEP) for index in range(4)]
        kept = [joined(store, run)[0] for run in runs]
        hidden = torch.randn(1, 20, 512)
        filler = {name: [value_of(name, chunk, 0.0) for chunk in range(3)] for name in NAMES}
        for checkpoint in kept:
            for chunk in CHUNKS:
                checkpoint.put("input", chunk, hidden[:, chunk.rank_slice])
                for name in ("out", "lse"):
                    checkpoint.put(name, chunk, filler[name][chunk.index])
        shared = [
            kept[-1].peek("input", chunk).untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
            for chunk in CHUNKS
        ]
        assert shared == [device == NO_LIMIT] * 3
        for chunk in CHUNKS:
            assert torch.equal(kept[-1].take("input", chunk), hidden[:, chunk.rank_slice])


def test_plans_are_made_and_said_once_and_buffers_serve_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_fpdt")
    with checkpoint_store(device=4000) as store:
        pinned = []
        for _ in range(3):
            held = forward_pass(store)
            store.kv_plan(held[0][0].step, CPU, False)
            pinned.append(store.used_bytes()["pinned"])
            del held
            gc.collect()
        assert len(store.plans) == 1 and len(caplog.messages) == 2 and len(set(pinned)) == 1
        assert "20 tokens in 3 chunks" in caplog.messages[0] and "keeps 4 inputs" in caplog.messages[0]


def test_closing_gives_everything_back_and_the_next_pass_starts_anew(tmp_path: Path) -> None:
    with checkpoint_store(**budgets(tmp_path)[3]) as store:  # type: ignore[arg-type]
        held = forward_pass(store)
        store.close()
        assert store.used_bytes() == {} and not store.plans and not list(tmp_path.iterdir())
        del held  # who held a pass may go after its memory
        gc.collect()
        _, _, values = forward_pass(store)
        for checkpoint, name, chunk, value in values:
            assert torch.equal(checkpoint.take(name, CHUNKS[chunk]), value)


def test_passes_that_wait_for_their_backward_pass_are_named_where_there_is_no_room() -> None:
    whole = 4 * (SIZES.input_total + SIZES.attention_total)
    with checkpoint_store(device=RESIDENT + whole + 8 * PAGE, host=0) as store:
        first = forward_pass(store)
        with pytest.raises(MemoryError, match="no room for .* Passes whose backward pass has not run yet hold theirs"):
            forward_pass(store), forward_pass(store), forward_pass(store)
        assert torch.equal(first[2][0][0].take("input", CHUNKS[0]), first[2][0][3])


# -- outputs of linears ---------------------------------------------------------------------------------------------

LINEARS = (LinearSize("q", 512, 256, captured=True), LinearSize("up", 512, 768, late=True))
LINEAR_STEP = step_of(20, 8, model=replace(WIDE, linears=(LINEARS,) * 4))
LINEAR_SIZES = LINEAR_STEP.layer_bytes()


def linear_of(name: str, chunk: Chunk, number: float) -> Tensor:
    width = next(linear.outputs for linear in LINEARS if linear.entry == name)
    return torch.full((1, chunk.stop - chunk.start, width), number)


def with_linears(store: CheckpointStore) -> tuple[list[FakeRun], list[LayerCheckpoint]]:
    """All layers forward, with everything that the plan has of them; a value is its layer's number."""
    runs = [FakeRun(index, LINEAR_STEP) for index in range(4)]
    kept = []
    for run in runs:
        kept.append(joined(store, run)[0])
        for chunk in CHUNKS:
            for name in NAMES if kept[-1].keeps_attention else NAMES[:1]:
                kept[-1].put(name, chunk, value_of(name, chunk.index, float(run.index)))
            for linear in LINEARS:
                kept[-1].put_linear(linear.entry, chunk, linear_of(linear.entry, chunk, float(run.index)))
            kept[-1].settle()
    return runs, kept


def tier_of(entry: object) -> str | None:
    kinds = {DeviceEntry: "device", HostEntry: "host", DiskTierEntry: "disk", type(None): None}
    return kinds[type(entry)]


def test_outputs_of_linears_lie_where_the_plan_has_them() -> None:
    every = peak_bytes(KeptLayers((True,) * 4, (True,) * 4), LINEAR_SIZES)
    for policy, room in (("linears", 0), ("linears", 200_000), ("auto", every + 90_000)):
        device = RESIDENT + room
        with checkpoint_store(device=device, policy=policy) as store:
            runs, kept = with_linears(store)
            (plan,) = store.plans.values()
            for layer, checkpoint in enumerate(kept):
                for linear, chunks in zip(LINEARS, plan.kept.linears[layer], strict=True):
                    found = [tier_of(checkpoint._entries.get((linear.entry, chunk.index))) for chunk in CHUNKS]
                    assert found == [chunks.tier(chunk.index, 3) for chunk in CHUNKS]
            used = store.used_bytes()
            assert used["device"] + used["host"] == forward_bytes(plan.kept, LINEAR_SIZES)
            assert used["device"] <= device and used["pinned"] == plan.forecast.host_bytes
            shares = {chunks for layer in plan.kept.linears for chunks in layer}
            assert len(shares) > 1 or not room
            for layer, checkpoint in reversed(list(enumerate(kept))):
                for chunk in reversed(CHUNKS):
                    for linear in LINEARS:
                        if checkpoint.holds(linear.entry, chunk):
                            value = checkpoint.take(linear.entry, chunk)
                            assert torch.equal(value, linear_of(linear.entry, chunk, float(layer)))
                    for name in NAMES if checkpoint.keeps_attention else NAMES[:1]:
                        checkpoint.take(name, chunk)
            assert store.used_bytes() == {"device": 0, "host": 0, "disk": 0, "pinned": used["pinned"]}
            assert len(runs) == 4


def test_what_is_not_of_the_plan_is_not_kept() -> None:
    with checkpoint_store(device=NO_LIMIT, policy="linears") as store:
        run = FakeRun(0, LINEAR_STEP)
        kept, _ = joined(store, run)
        q = LINEARS[0].entry
        kept.put_linear("linear of no plan", CHUNKS[0], linear_of(q, CHUNKS[0], 1.0))
        kept.put_linear(q, CHUNKS[0], torch.zeros(1, 3, 256))  # of some tokens, as of an expert's
        assert not store.used_bytes()["device"]
        kept.settle()
        for number in (1.0, 2.0, 3.0):  # of which call it is nobody could say
            kept.put_linear(q, CHUNKS[0], linear_of(q, CHUNKS[0], number))
            assert kept.holds(q, CHUNKS[0]) == (number == 1.0)
        kept.settle()
        kept.put_linear(q, CHUNKS[0], linear_of(q, CHUNKS[0], 4.0))
        assert torch.equal(kept.peek(q, CHUNKS[0]), linear_of(q, CHUNKS[0], 4.0))
        kept.forget_linears(CHUNKS[1])
        assert kept.holds(q, CHUNKS[0])
        kept.forget_linears(CHUNKS[0])
        assert not kept.holds(q, CHUNKS[0]) and not store.used_bytes()["device"]


def test_a_copy_of_a_linear_s_output_is_waited_for_a_chunk_later(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    settle = HostEntry.settle

    def noted(entry: HostEntry) -> None:
        settled.append(f"{entry._shape[-1]}")
        settle(entry)

    monkeypatch.setattr(HostEntry, "settle", noted)
    with checkpoint_store(device=RESIDENT, policy="linears") as store:
        run, up = FakeRun(0, LINEAR_STEP), LINEARS[1].entry
        kept, _ = joined(store, run)
        seen = []
        for chunk in CHUNKS:
            kept.put("input", chunk, value_of("input", chunk.index, 0.0))
            kept.put_linear(up, chunk, linear_of(up, chunk, 0.0))
            kept.settle()
            seen.append([*settled])
            settled.clear()
        assert seen == [["512"], ["512", "768"], ["512", "768"]]
        kept.expect([])
        assert settled == ["768"]


def test_other_entries_take_the_place_of_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass before the first one's backward pass: nothing that must be kept is refused."""
    with checkpoint_store(device=NO_LIMIT, policy="linears") as store:
        joined(store, FakeRun(0, LINEAR_STEP))
        (plan,) = store.plans.values()
    needed, linears = plan.forecast.device_bytes, linear_bytes(plan.kept, LINEAR_SIZES).total
    with checkpoint_store(device=RESIDENT + needed + 2000, host=0, policy="linears") as store:
        first = with_linears(store)
        assert store.used_bytes()["device"] == needed
        begun = count_fetches(monkeypatch)
        first[1][3].expect(first[1][3].entries(*(linear.entry for linear in LINEARS), "input", chunks=CHUNKS))
        second = with_linears(store)
        used = store.used_bytes()["device"]
        assert needed - linears < used <= RESIDENT + needed and not begun
        assert not any(each.holds(linear.entry, CHUNKS[0]) for each in first[1] for linear in LINEARS)
        for held in (first, second):
            for checkpoint in held[1]:
                assert torch.equal(checkpoint.take("input", CHUNKS[1]), checkpoint.take("out", CHUNKS[1]).flatten(2))


def test_reads_that_are_passed_over_do_not_end_the_reads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = count_fetches(monkeypatch)
    with checkpoint_store(device=RESIDENT, policy="linears") as store:
        _, kept = with_linears(store)
        q, up = (linear.entry for linear in LINEARS)
        top = kept[-1]
        top.expect(top.entries("input", q, "out", up, "lse", chunks=reversed(CHUNKS)))
        for chunk in reversed(CHUNKS):
            top.take("input", chunk)
            top.take("out", chunk)  # q was not asked for
            top.forget_linears(chunk)
            top.take("lse", chunk)
        assert len(begun) == len(set(map(id, begun))) <= 15 and not store._reads
