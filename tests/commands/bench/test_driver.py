"""What `hf-fpdt bench` does around its processes: order, limits, the search for the longest, figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import psutil
import pytest

from hf_fpdt.commands.bench.children import Children
from hf_fpdt.commands.bench.driver import Bench, find_longest, unit_of
from hf_fpdt.commands.bench.figures import Rates, Trained
from hf_fpdt.commands.bench.job import Job, Outcome
from hf_fpdt.commands.bench.report import as_table, conditions_line
from hf_fpdt.forecast.rates import GPUS
from tests.commands.bench.test_bench import JOB
from tests.forecast.test_rates import LLAMA_8B

TRAINED = Trained(sizes=LLAMA_8B, vocabulary=128_256, full=False)
RATES = Rates(forward=650e12, backward=600e12, matmul=670e12, kernel="fa4")
H100 = "NVIDIA H100 80GB HBM3"


def command(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def answering(found: str) -> tuple[str, ...]:
    """A child that waits for its job and answers with an expression."""
    wait = "import json, os, sys; sys.stdin.readline(); job = json.load(open(sys.argv[1])); "
    return command(wait + f"json.dump({{'found': {found}, 'reason': ''}}, open(sys.argv[2], 'w'))")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(60)", "over the limit: not done in 1 s (--limit)"),
        ("import os; os.kill(os.getpid(), 9)", "killed (signal 9)"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("raise RuntimeError('CUDA error: out of memory')", "failed: RuntimeError: CUDA error: out of memory"),
        ("raise SystemExit(3)", "failed: exit status 3"),
    ],
)
def test_whatever_becomes_of_a_child_is_an_outcome(code: str, reason: str) -> None:
    with Children(1 if "sleep" in code else 60, command(code)) as children:
        outcome = children.run(JOB)
    assert outcome.reason.startswith(reason) and not outcome.found


def test_a_child_gets_the_job_and_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    found = "{'tokens': job['tokens'], 'allocator': os.environ['PYTORCH_CUDA_ALLOC_CONF']}"
    with Children(60, answering(found)) as children:
        outcome = children.run(replace(JOB, tokens=(7,)))
    assert outcome == Outcome({"tokens": [7], "allocator": "expandable_segments:True"})
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    with Children(60, answering(found)) as children:
        assert children.run(JOB).found["allocator"] == "backend:native"


@pytest.mark.parametrize(("device", "ahead"), [("cuda", True), ("cpu", False)])
def test_on_a_gpu_the_next_process_waits_while_this_one_works(device: str, ahead: bool) -> None:
    before = {process.pid for process in psutil.Process().children()}
    with Children(60, answering("{'tokens': job['tokens'], 'pid': os.getpid()}")) as children:
        outcomes = []
        for n_tokens in (1, 2, 3):
            outcomes.append(children.run(replace(JOB, device=device, tokens=(n_tokens,))).found)
            (*waiting,) = {process.pid for process in psutil.Process().children()} - before
            assert len(waiting) == ahead
            if ahead and n_tokens < 3:
                following = waiting[0]
        assert [found["tokens"] for found in outcomes] == [[1], [2], [3]]
        assert len({found["pid"] for found in outcomes}) == 3
        if ahead:
            assert outcomes[-1]["pid"] == following
    assert {process.pid for process in psutil.Process().children()} == before


@pytest.mark.parametrize("limit", [0, 1024, 5000, 32_768, 33_000, 131_072, 700_000, 3_000_000])
@pytest.mark.parametrize("start", [1024, 32_768, 262_144])
def test_the_longest_is_found_to_three_percent(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(n_tokens: int) -> bool:
        tried.append(n_tokens)
        return n_tokens <= limit

    found = find_longest(fits, start)
    assert found <= limit < found + unit_of(max(found, 1)) or (found, limit) == (0, 0)
    assert unit_of(max(found, 1)) <= max(1024, found / 32)
    assert len(tried) == len(set(tried)) <= 20 and all(n_tokens % 1024 == 0 for n_tokens in tried)


def test_the_longest_is_soon_found_between_two_guesses() -> None:
    tried: list[int] = []

    def fits(n_tokens: int) -> bool:
        tried.append(n_tokens // 1024)
        return tried[-1] < 142

    assert find_longest(fits, 152 * 1024, 136 * 1024) == 140 * 1024 and tried == [136, 152, 144, 140]
    tried.clear()
    assert find_longest(fits, 64 * 1024, 65 * 1024) == 140 * 1024 and tried[:4] == [64, 65, 130, 260]


class Machine:
    """Runs no process: stacks whose name begins with "wrong" fail the comparison, lengths over `room` do not fit."""

    def __init__(self, room: int = 2**20, ceiling: bool = True, patience: int = 2**30) -> None:
        self.room, self.ceiling, self.patience = room, ceiling, patience
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> Outcome:
        self.jobs.append(job)
        facts: dict[str, Any] = {"gpu": H100, "commit": "abc"}
        if job.kind == "parity":
            passed = not job.stack.startswith("wrong")
            return Outcome(facts | {"passed": passed, "parity": 1.1, "verdict": "fine" if passed else "wrong!"})
        if job.kind == "ceiling":
            rates = {str(min(n, 131_072)): [650e12, 600e12] for n in job.tokens}
            found = {"attention": rates, "matmul": 670e12, "kernel": "fa4"}
            return Outcome(facts | found) if self.ceiling else Outcome(facts, "no kernel")
        if job.n_tokens > self.patience:
            return Outcome({}, "over the limit: not done in 9 s (--limit)")
        if job.n_tokens > self.room:
            return Outcome(facts, "out of GPU memory: x")
        return Outcome(facts | {"step_s": 41.581, "peak_device_gib": 74.5, "pinned_host_gib": 16.9})

    def bench(self, *stacks: str, lengths: tuple[int, ...] = (131_072,), longest: bool = False) -> Bench:
        job = replace(JOB, kind="step", tokens=lengths, device="cuda")
        return Bench(
            job=job, stacks=stacks, trained=TRAINED, name="x", longest=longest, run=self, say=lambda text: None
        )


def test_no_speed_without_the_comparison() -> None:
    machine = Machine()
    rows = list(machine.bench("wrong", "hf", lengths=(1024, 2048)).rows())
    assert [(row["stack"], row["tokens"], row["result"]) for row in rows] == [
        ("wrong", 1024, "wrong!"),
        ("wrong", 2048, "wrong!"),
        ("hf", 1024, "ok"),
        ("hf", 2048, "ok"),
    ]
    assert not any("tokens_per_s" in row for row in rows[:2])
    kinds = [(job.kind, job.stack) for job in machine.jobs]
    assert kinds == [("parity", "wrong"), ("parity", "hf"), ("ceiling", ""), ("step", "hf"), ("step", "hf")]


def test_a_row_has_the_figures_of_the_formulas() -> None:
    (row,) = Machine().bench("fpdt").rows()
    n_tokens, seconds = 131_072, 41.581
    layers = 32 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 14_336)
    attention = 32 * n_tokens * 4096
    strict = n_tokens * (4 * (layers + 128_256 * 4096) + 6 * attention)
    again = n_tokens * (2 * layers + 2 * attention)
    peak = GPUS["h100"].peak
    assert row["tokens_per_s"] == pytest.approx(n_tokens / seconds)
    assert row["strict_mfu"] == pytest.approx(strict / seconds / peak) == pytest.approx(0.424, abs=0.001)
    assert row["mfu_with_recompute"] == pytest.approx((strict + again) / seconds / peak)
    forward = 2 * n_tokens * attention
    least = forward / 650e12 + 2.5 * forward / 600e12 + 2 * n_tokens * (3 * layers + 2 * 128_256 * 4096) / 670e12
    assert row["ceiling_s"] == pytest.approx(least) and row["of_ceiling"] == pytest.approx(least / seconds)
    assert least < seconds
    once = least - 2 * n_tokens * layers / 670e12
    assert row["ceiling_once_s"] == pytest.approx(once) and row["of_ceiling_once"] == pytest.approx(once / seconds)


def test_training_every_weight_raises_the_ceiling_by_their_gradients() -> None:
    full, adapters = replace(TRAINED, full=True), TRAINED
    extra = 2 * 4096 * (32 * LLAMA_8B.linear_weights + 128_256 * 4096) / RATES.matmul
    assert full.ceiling_seconds(4096, RATES) - adapters.ceiling_seconds(4096, RATES) == pytest.approx(extra)


def test_no_ceiling_loses_no_row_and_no_gpu_no_figure_but_speed() -> None:
    (row,) = Machine(ceiling=False).bench("fpdt").rows()
    assert row["result"] == "ok" and "of_ceiling" not in row and "strict_mfu" in row
    assert TRAINED.figures(100, 2.0, None, None) == {"tokens_per_s": 50.0}


def test_the_longest_row_says_what_came_of_the_next_length() -> None:
    machine = Machine(room=100_000)
    rows = list(machine.bench("fpdt", "wrong", lengths=(32_768,), longest=True).rows())
    assert 97_000 < rows[0]["tokens"] <= 100_000 and rows[0]["result"] == "ok"
    assert "out of GPU memory" in rows[0]["next"]
    assert rows[1]["result"] == "wrong!"
    (none,) = Machine(room=0).bench("fpdt", longest=True).rows()
    assert none["tokens"] == 1024 and "out of GPU memory" in none["result"]
    # Too slow is not too long: nothing in between is tried.
    (slow,) = Machine(patience=50_000).bench("fpdt", lengths=(16_384,), longest=True).rows()
    assert slow["tokens"] == 32_768 and slow["next"].startswith("65,536 tokens: over the limit")


def test_the_table_has_a_line_for_every_row_and_the_conditions_once() -> None:
    rows = list(Machine(room=150_000).bench("fpdt", "wrong", lengths=(131_072, 262_144)).rows())
    lines = as_table(rows).splitlines()
    assert len(lines) == 5 and "3,152" in lines[1] and "0.424" in lines[1]
    assert lines[2].endswith("out of GPU memory: x") and lines[3].endswith("wrong!")
    line = conditions_line(rows)
    assert H100 in line and "commit abc" in line and line.count(H100) == 1
