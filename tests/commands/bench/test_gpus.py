"""`hf-fpdt bench --gpus N` with gloo processes on a CPU: what they compute together, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from hf_fpdt.commands.bench import child
from hf_fpdt.commands.bench.children import LAUNCHER, Children, _Child, command_for
from hf_fpdt.commands.bench.job import Job
from hf_fpdt.commands.bench.parity import check
from hf_fpdt.commands.bench.ranks import World
from hf_fpdt.commands.bench.report import as_table
from hf_fpdt.commands.bench.stacks.base import Stack, Unavailable
from hf_fpdt.commands.bench.stacks.catalogue import STACKS, Fpdt, FpdtOnHost
from hf_fpdt.commands.bench.steps import measure, together
from hf_fpdt.commands.main import main
from tests.commands.bench.test_bench import JOB, job
from tests.commands.bench.test_driver import TRAINED, Machine
from tests.helpers import bench_stacks
from tests.helpers.processes import LIMIT_S
from tests.helpers.support import assert_rejects, spawn

RANK = Path(__file__).parents[2] / "launched" / "bench_rank.py"
TWO_RANKS = (*LAUNCHER, "--nproc-per-node", "2", str(RANK))
# By whether every weight trains: under FSDP2, or adapters alone under DDP.
RIGHT: Mapping[bool, tuple[type[Stack], ...]] = {
    False: (Fpdt, bench_stacks.RingOnCpu),
    True: (FpdtOnHost, bench_stacks.RingOnCpu),
}
WRONG: Mapping[bool, tuple[type[Stack], ...]] = {
    # FSDP2's gradients are whole again before they are compared, so what is wrong on one rank is wrong on all.
    False: (bench_stacks.OwnMean, bench_stacks.LostPart, bench_stacks.NotReduced, bench_stacks.WrongOnRankOne),
    True: (bench_stacks.RingOfWrongSum,),
}


# What they compute ---------------------------------------------------------------------------------------------------


def _compared(rank: int, world: int, task: Job) -> None:
    def verdict(kind: type[Stack]) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        stack = kind()
        stack.world = World(world, rank)
        parity = check(stack, task)
        assert parity.passed, parity

    for full in (False, True):
        task = replace(task, full=full)
        for kind in RIGHT[full]:
            verdict(kind)
        # A rank whose verdict is its own would wait for the others here.
        assert_rejects(verdict, {kind.__name__: kind for kind in WRONG[full]})


def test_right_stacks_pass_and_wrong_ones_do_not_on_two_ranks(tmp_path: Path) -> None:
    """In float32; each rank comes to the same verdict."""
    spawn(_compared, 2, job(tmp_path, gpus=2))


def _measured(rank: int, world: int, task: Job) -> None:
    stack = bench_stacks.RingOnCpu()
    stack.world = World(world, rank)
    assert measure(stack, task)["loss"] > 4
    assert stack.masks == [None, None]  # of a short step and of the one that counts


def test_ring_makes_no_mask_of_tokens_times_tokens(tmp_path: Path) -> None:
    spawn(_measured, 2, job(tmp_path, gpus=2, tokens=(1024,), steps=1))


@pytest.mark.slow
def test_a_launched_step_has_one_row(tmp_path: Path) -> None:
    task = job(tmp_path, kind="step", stack="fpdt", tokens=(601,), steps=2, chunk_tokens=256, gpus=2)
    with Children(LIMIT_S, command_for(2)) as children:
        outcome = children.run(task)
    assert not outcome.reason, outcome.reason
    found = outcome.found
    assert len(found["steps_s"]) == 2 and found["step_s"] > 0 and 4 < found["loss"] < 6
    assert found["gpus"] == 2 and found["peak_rss_gib"] > 0.3 and found["peak_device_gib"] is None
    assert found["predicted_pinned_gib"] == found["pinned_host_gib"] == 0 < found["predicted_device_gib"]


def test_a_row_is_the_slowest_gpu_the_fullest_and_the_host_of_all() -> None:
    one = {"took_s": [9.0, 5.0, 5.0], "pinnings_s": [3.0, 0.0, 0.0], "loss": 2.0, "peak_device_gib": 7.0}
    two = {"took_s": [8.0, 6.0, 4.0], "pinnings_s": [2.0, 1.0, 0.0], "loss": 2.0, "peak_device_gib": 8.0}
    host = {"pinned_host_gib": 1.0, "peak_rss_gib": 4.0}
    row = together([one | host, two | host])
    assert row["steps_s"] == [7.0, 6.0, 5.0] and row["step_s"] == 5.5 and row["pinning_s"] == 2.0
    assert (row["peak_device_gib"], row["pinned_host_gib"], row["peak_rss_gib"]) == (8.0, 2.0, 8.0)


def test_figures_are_over_the_peaks_of_all_gpus() -> None:
    (one,), bench = Machine().bench("fpdt").rows(), Machine().bench("fpdt")
    (two,) = replace(bench, job=replace(bench.job, gpus=2)).rows()
    assert two["tokens_per_s"] == one["tokens_per_s"] and two["gpus"] == 2
    for name in ("strict_mfu", "mfu_with_recompute", "of_ceiling"):
        assert two[name] == pytest.approx(one[name] / 2)
    assert "GPUs" in as_table([two]) and "GPUs" not in as_table([one])
    assert TRAINED.figures(100, 2.0, None, None, gpus=2) == {"tokens_per_s": 50.0}


# How they end --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where ranks say theirs; none is left after the test."""
    path = tmp_path / "pids"
    path.touch()
    yield path
    for pid in map(int, path.read_text().split()):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def works(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(holds: Any, seconds: float = LIMIT_S) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("killed", "killed (signal 9): the host ran out of memory, most likely (rank 1)"),
        ("ends", "failed: exit status 3 (rank 1)"),
    ],
)
def test_whatever_becomes_of_a_rank_is_an_outcome(what: str, reason: str, pids: Path) -> None:
    with Children(LIMIT_S, TWO_RANKS) as children:
        outcome = children.run(replace(JOB, stack=what, model=str(pids), gpus=2))
    assert outcome.reason == reason
    ranks = list(map(int, pids.read_text().split()))
    assert len(ranks) == 2 and not any(map(works, ranks))


def test_ranks_are_gone_when_their_job_is_ended(pids: Path) -> None:
    """As the time limit ends it; their memory is the next job's at once."""
    running = _Child(TWO_RANKS)
    replace(JOB, stack="waits", model=str(pids)).write(running._job)
    running._say_so()
    wait_until(lambda: len(pids.read_text().split()) == 2)
    running.end()
    assert not any(map(works, map(int, pids.read_text().split())))


def test_no_job_no_work(tmp_path: Path, pids: Path) -> None:
    replace(JOB, model=str(pids)).write(tmp_path / "job")
    command = [sys.executable, str(RANK), str(tmp_path / "job"), str(tmp_path / "result")]
    assert subprocess.run(command, input=b"", timeout=LIMIT_S).returncode == 0 and not pids.read_text()


def test_ranks_end_with_the_parent(tmp_path: Path, pids: Path) -> None:
    replace(JOB, stack="waits", model=str(pids)).write(tmp_path / "job")
    command = [*TWO_RANKS, str(tmp_path / "job"), str(tmp_path / "result")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as launcher:
        assert launcher.stdin is not None
        launcher.stdin.write(b"\n")
        launcher.stdin.flush()
        wait_until(lambda: len(pids.read_text().split()) == 2)
        assert all(map(works, map(int, pids.read_text().split())))
        # As when its only holder is killed: nobody sends a signal.
        launcher.stdin.close()
        try:
            wait_until(lambda: not any(map(works, map(int, pids.read_text().split()))))
            assert launcher.wait(LIMIT_S) != 0
        finally:
            launcher.kill()


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> World:
    """This process is rank 1 of 2 that do not communicate; it ends as SystemExit."""
    world = World(2, 1)
    monkeypatch.setattr(child, "place", lambda gpus: world)
    for name in ("join", "leave"):
        monkeypatch.setattr(child, name, lambda *_: None)
    monkeypatch.setattr(child, "_go_first", lambda: None)
    monkeypatch.setattr(child, "LAUNCHER_S", 0)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return world


def test_the_first_rank_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_one: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(job: Job, world: World) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    JOB.write(tmp_path / "job")
    monkeypatch.setattr(child, "work", fails)
    with pytest.raises(SystemExit, match="1"):
        child.main(str(tmp_path / "job"), str(tmp_path / "result"))
    reason = json.loads((tmp_path / "result").read_text())["reason"]
    assert reason == "out of GPU memory: CUDA out of memory. (rank 1 of 2)"
    for name, expected in (("result", reason), ("other", "failed: ValueError: a defect (rank 1 of 2)")):
        with pytest.raises(SystemExit, match="1"):
            child._fail(tmp_path / name, rank_one, ValueError, ValueError("a defect"), None)
        assert json.loads((tmp_path / name).read_text())["reason"] == expected
    assert "ValueError: a defect" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "other", "result"]


def test_a_rank_without_a_result_leaves_it_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_one: World
) -> None:
    JOB.write(tmp_path / "job")
    monkeypatch.setattr(child, "work", lambda job, world: {"step_s": 1.0})
    child.main(str(tmp_path / "job"), str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()


# What is refused -----------------------------------------------------------------------------------------------------


def test_stacks_say_on_how_many_gpus_they_train() -> None:
    for name, kind in STACKS.items():
        alone, together = name not in ("ring", "alst-sp"), name in ("fpdt", "fpdt-host", "ring", "alst-sp")
        for count, right in ((1, alone), (2, together), (8, together)):
            if right:
                kind.check_gpus(count)
            else:
                with pytest.raises(Unavailable, match=f"--gpus {count}: the stack {name} is for "):
                    kind.check_gpus(count)


def test_the_command_refuses_them_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for options, message in (
        (["--gpus", "2", "--device", "cpu", "--stacks", "fpdt", "liger"], "--gpus 2: the stack liger is for one"),
        (["--stacks", "ring", "fpdt"], "--gpus 1: the stack ring is for at least 2"),
        (["--gpus", "2", "--stacks", "fpdt"], "--gpus 2: torch finds 1 here"),
        (["--held-gib", "1", "--device", "cpu", "--stacks", "fpdt"], "--held-gib: it holds memory of a GPU"),
    ):
        assert main(["bench", *options]) == 2 and message in capsys.readouterr().err
