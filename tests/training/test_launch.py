"""FPDTTrainer really launched by `accelerate launch`, on two and four processes, against one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from tests.helpers.processes import run_or_tell
from tests.helpers.support import assert_rejects
from tests.launched.train import Run, execute

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tests" / "launched" / "train.py"
# The models are float64; transformers casts inside of them, and Trainer's logs, are fp32.
WEIGHTS, LOSSES = 1e-7, 1e-6


def launch(script: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on this machine's CPU; `--cpu` would start one process whatever it is asked for."""
    counts = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *counts, *plain]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = run_or_tell([*command, str(script), *arguments], environment=environment)
    done.stdout += done.stderr
    return done


@dataclass(frozen=True)
class Result:
    """What a run left: numbers by name, and weights."""

    numbers: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def read(folder: Path, name: str) -> Result:
    return Result(json.loads((folder / f"{name}.json").read_text()), torch.load(folder / f"{name}.pt"))


def assert_same(ours: Result, truth: Result) -> None:
    """Equal weights, losses, gradient norms, evaluations and counts."""
    for name, weight in truth.weights.items():
        error = (ours.weights[name] - weight).abs().max()
        assert error <= WEIGHTS, f"{name}: {error:.1e}"
    for name in ("loss", "grad_norm", "epoch"):
        assert_near(ours.numbers[name], truth.numbers[name], name)
    for name in ("eval_loss by 1", "eval_loss by 2", "test_loss", "batch_size", "steps", "seen"):
        assert_near([ours.numbers[name]], [truth.numbers[name]], name)


def assert_near(ours: list[float], truth: list[float], name: str) -> None:
    assert len(ours) == len(truth), f"{name}: {len(ours)} values, not {len(truth)}"
    for mine, other in zip(ours, truth, strict=True):
        assert abs(mine - other) <= LOSSES * abs(other), f"{name}: {mine}, not {other}"


@dataclass(frozen=True)
class Case:
    """A run on many processes, and the change that makes it the same on one."""

    run: Run
    alone: Mapping[str, Any]

    def on_one_process(self) -> Run:
        return replace(self.run, sp_size=1, **self.alone)


SAVED = Run(steps=4, save_steps=2)
TWO_PROCESSES: Mapping[str, Case] = {
    "ddp": Case(Run(), {"batch_size": 2}),
    "sp": Case(Run(sp_size=2, batch_size=2), {}),
    "sp of single samples": Case(Run(sp_size=2), {}),
    "ddp, lora": Case(Run(lora=True), {"batch_size": 2}),
    "sp, lora": Case(Run(sp_size=2, batch_size=2, lora=True), {}),
    "ddp, accumulated": Case(Run(grad_accum=2), {"batch_size": 2}),
    "sp, accumulated": Case(Run(sp_size=2, grad_accum=2), {}),
    "sp, random rows in workers": Case(Run(sp_size=2, batch_size=2, workers=2, random_rows=True), {}),
    "ddp, streamed": Case(Run(stream=True), {"batch_size": 2}),
    "sp, streamed": Case(Run(sp_size=2, batch_size=2, stream=True), {}),
    "ddp, two epochs": Case(Run(epochs=2, batch_size=3), {"batch_size": 6}),
    "sp, two epochs": Case(Run(sp_size=2, epochs=2, batch_size=5), {}),
    "sp, by length": Case(Run(sp_size=2, batch_size=2, sampling="group_by_length"), {}),
    "ddp, saved": Case(SAVED, {"batch_size": 2}),
    "sp, saved": Case(replace(SAVED, sp_size=2, batch_size=2), {}),
}
RESUMED: Mapping[str, Run] = {
    "ddp, resumed": Run(steps=4, resume="ddp, saved/checkpoint-2"),
    "sp, resumed": Run(steps=4, sp_size=2, batch_size=2, resume="sp, saved/checkpoint-2"),
}
FOUR_PROCESSES: Mapping[str, Case] = {
    "sp and dp": Case(Run(sp_size=2), {"batch_size": 2}),
    "sp and dp, lora": Case(Run(sp_size=2, lora=True, grad_accum=2), {"batch_size": 2}),
    "sp of four": Case(Run(sp_size=4, batch_size=2), {}),
}


def launched(folder: Path, processes: int, runs: Mapping[str, Run]) -> Path:
    done = launch(TRAIN, processes, str(folder), json.dumps({name: asdict(run) for name, run in runs.items()}))
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def launched_once(factory: pytest.TempPathFactory, name: str, processes: int, runs: Mapping[str, Run]) -> Path:
    """By the first of pytest's workers that needs it; it is the most that this file takes."""
    ours = factory.getbasetemp()
    folder = (ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours) / f"launched {name}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = factory.mktemp(name)
            launched(unfinished, processes, runs).rename(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two processes, by one launch."""
    runs = {name: case.run for name, case in TWO_PROCESSES.items()}
    return launched_once(tmp_path_factory, "two", 2, {**runs, **RESUMED})


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched_once(tmp_path_factory, "four", 4, {name: case.run for name, case in FOUR_PROCESSES.items()})


def alone(case: Case, folder: Path) -> Result:
    execute(case.on_one_process(), folder, "alone")
    return read(folder, "alone")


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_train_as_one(name: str, two: Path, tmp_path: Path) -> None:
    assert_same(read(two, name), alone(TWO_PROCESSES[name], tmp_path))


@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_four_processes_train_as_one(name: str, four: Path, tmp_path: Path) -> None:
    assert_same(read(four, name), alone(FOUR_PROCESSES[name], tmp_path))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(name: str, two: Path) -> None:
    whole, resumed = read(two, name.replace("resumed", "saved")), read(two, name)
    # The log of the first two steps comes out of the checkpoint; what was trained after it is compared exactly.
    assert resumed.numbers["computed"] < whole.numbers["computed"], "steps were run again"
    assert {**resumed.numbers, "computed": whole.numbers["computed"]} == whole.numbers
    for weight in whole.weights:
        assert torch.equal(resumed.weights[weight], whole.weights[weight]), weight


def test_the_check_rejects_broken_runs(two: Path, tmp_path: Path) -> None:
    truth = alone(TWO_PROCESSES["sp"], tmp_path)
    ours = read(two, "sp")

    def changed(name: str, change: Any) -> Result:
        return Result({**ours.numbers, name: change(ours.numbers[name])}, ours.weights)

    weights = {name: weight * (1 + 1e-5) for name, weight in ours.weights.items()}
    broken = {
        "half the batch": read(two, "sp of single samples"),
        "random rows": read(two, "sp, random rows in workers"),
        "a step more": read(two, "sp, saved"),
        "weights": Result(ours.numbers, weights),
        "another gradient norm": changed("grad_norm", lambda norms: [2**0.5 * norm for norm in norms]),
        "a rank's own loss": changed("loss", lambda losses: [loss * 1.0001 for loss in losses]),
        "an evaluation with filling": changed("eval_loss by 2", lambda loss: loss * 1.001),
        "a batch size of all ranks": changed("batch_size", lambda size: size * 2),
    }
    assert_same(ours, truth)
    assert_rejects(lambda result: assert_same(result, truth), broken)


def test_batches_and_epochs_are_counted_by_groups(two: Path, four: Path) -> None:
    counted = {name: read(two, name).numbers for name in TWO_PROCESSES}
    sizes = {name: numbers["batch_size"] for name, numbers in counted.items()}
    assert sizes["ddp"] == sizes["sp"] == sizes["ddp, accumulated"] // 2 == sizes["sp, accumulated"] == 2
    assert counted["ddp, two epochs"]["steps"] == 2 * 4 and counted["sp, two epochs"]["steps"] == 2 * 5
    assert counted["sp, two epochs"]["epoch"][-1] == 2
    assert [read(four, name).numbers["batch_size"] for name in FOUR_PROCESSES] == [2, 4, 2]


def test_logged_speeds_are_of_the_tokens_of_all_processes(two: Path, four: Path) -> None:
    """Trainer counts 6 operations a token and parameter, of all processes, and padding, which may not be computed."""
    for folder, names in ((two, TWO_PROCESSES), (four, FOUR_PROCESSES)):
        for name in names:
            told = read(folder, name).numbers
            assert len(told["speed_tokens"]) == told["steps"], name
            if "lora" not in name:  # of which Trainer counts the adapters' parameters too
                with_padding = told["tokens"] / (6 * told["parameters"])
                assert sum(told["speed_tokens"]) == told["computed"] <= with_padding, name


def test_ranks_that_share_rows_do_not_compute_their_padding(two: Path, tmp_path: Path) -> None:
    """One process computes none; ranks fill a step's row up to their multiple."""
    computed, told = alone(TWO_PROCESSES["sp"], tmp_path).numbers["computed"], read(two, "sp").numbers
    assert 0 <= told["computed"] - computed <= told["steps"]


def test_predictions_have_a_row_for_each_sample_or_none(two: Path, four: Path) -> None:
    assert read(two, "ddp").numbers["label_rows"] == 5
    assert read(two, "sp").numbers["label_rows"] is None and read(four, "sp and dp").numbers["label_rows"] is None


@pytest.mark.parametrize("sp_size", [2])
def test_a_rank_that_raises_ends_the_job_within_seconds(sp_size: int, tmp_path: Path) -> None:
    run = Run(sp_size=sp_size, steps=200, fail_on_rank=1)
    done = launch(TRAIN, 2, str(tmp_path), json.dumps({"fails": asdict(run)}))
    ended = time.time()
    raised = re.search(r"RuntimeError: this rank was told to fail at ([\d.]+)", done.stdout)
    assert done.returncode != 0 and raised is not None, done.stdout[-6000:]
    assert "in on_step_begin" in done.stdout, "its own traceback"
    assert ended - float(raised.group(1)) < 60, "the other rank waits for it much longer"


def test_a_refusal_is_seen_and_ends_the_job(tmp_path: Path) -> None:
    done = launch(TRAIN, 2, str(tmp_path), json.dumps({"refused": {"sp_size": 4}}))
    assert done.returncode != 0
    assert "ValueError: hf_fpdt: sp_size=4 does not divide the 2 processes of this job" in done.stdout
