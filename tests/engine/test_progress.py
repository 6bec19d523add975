"""The line inside a long step: there on a terminal, nowhere else, complete at the end, and free."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest
import torch

import hf_fpdt.model.apply
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.progress import StepProgress
from tests.helpers.truth import tiny

STEP = """
import torch
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine import progress
from tests.helpers.truth import tiny
progress.SECONDS = 0
model = tiny("llama", num_hidden_layers=4)
apply_fpdt(model, FPDTPlugin(chunk_tokens=64, progress=True, checkpoints="segment"))
ids = torch.randint(0, 97, (1, 1024))
model(input_ids=ids, labels=ids).loss.backward()
"""
TIMING = """
import time
from hf_fpdt.engine import progress
progress.SECONDS = 0.01
line = progress.StepProgress(peak=989e12)
line.begin(1e18)
began = time.process_time()  # of this process: others may be at work on the same cores
for _ in range(5000):
    line.advance(1e12, 1e12, "backward layer 1/32 chunk 1/16")
print((time.process_time() - began) / 5000)
"""
LATE = """
import sys
class Mark:
    done = False
    def is_passed(self):
        return Mark.done
progress.SECONDS, progress.Mark = 0, Mark
line = progress.StepProgress()
line.begin(1000.0)
line.advance(500.0, 500.0, "handed")
line.advance(100.0, 100.0, "over")
sys.stderr.write("and done")
Mark.done = True
line.advance(150.0, 150.0, "last")
line.advance(250.0, 250.0, "end")
"""
SLOWER = """
sys.stderr.write("slower")
line = progress.StepProgress()
line.begin(10_000.0)
for pause, operations, times in ((0.002, 100.0, 50), (0.2, 10.0, 6)):
    for _ in range(times):
        time.sleep(pause)
        line.advance(operations, operations, "part")
"""


def on_a_terminal(script: str, **environment: str) -> tuple[str, str]:
    """What a script writes to a terminal (stderr), and its standard output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one has no columns
    command, variables = [sys.executable, "-c", script], {**os.environ, **environment}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=variables, text=True) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            seen += part
            if not part:
                break
        assert child.stdout is not None
        out = child.stdout.read()
    os.close(ours)
    assert child.returncode == 0, seen.decode(errors="replace")
    return seen.decode(errors="replace"), out


@pytest.fixture(scope="module")
def told() -> tuple[str, str]:
    """By one process: starting one takes longer than what it does."""
    return on_a_terminal(STEP + TIMING + LATE + SLOWER)


def test_a_terminal_shows_layer_chunk_speed_and_time_left(told: tuple[str, str]) -> None:
    text = told[0].partition("backward layer 1/32")[0]
    for phase in ("forward", "rebuild", "backward"):
        looks = rf"{phase} layer [1-4]/4 chunk \d+/16 +\d+%\|.*\d\d:\d\d<\S+, [\d.]+ GFLOP/s"
        assert re.search(looks, text), text[-2000:]


def test_what_the_gpu_has_still_to_do_is_not_counted(told: tuple[str, str]) -> None:
    before, after = told[0].partition("slower")[0].rpartition("backward layer 1/32")[2].split("and done")
    assert "0%" in before and "handed" not in before and "over" not in before
    assert "handed  50%" in after and "end 100%" in after


def test_the_time_left_goes_by_the_whole_step(told: tuple[str, str]) -> None:
    """Half of it took a second, so the other half will, whatever the last parts took."""
    shown = re.findall(r"(\d+)%\|.{20}\| \d\d:\d\d<(\d\d):(\d\d)", told[0].partition("slower")[2])
    assert len(shown) == 56, "small parts show too"
    percent, minutes, seconds = map(int, shown[-1])
    assert percent == 51 and 60 * minutes + seconds < 30, "by the last parts it would be three quarters of a minute"


def test_nothing_is_written_where_there_is_no_terminal_or_by_other_processes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fpdt.engine.progress.SECONDS", 0)
    exec(STEP, {})
    assert "%|" not in capfd.readouterr().err
    assert "chunk" not in on_a_terminal(STEP, RANK="1")[0]


def test_a_part_costs_less_than_a_tenth_of_a_millisecond(told: tuple[str, str]) -> None:
    """A chunk takes tens of milliseconds at the least: far below 0.5 %."""
    text, seconds = told
    assert "backward layer 1/32" in text and float(seconds) < 1e-4


class Told(StepProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[float] = []
        self.parts: list[tuple[float, str]] = []

    def begin(self, operations: float) -> None:
        self.totals.append(operations)

    def advance(self, operations: float, strict: float, what: str) -> None:
        self.parts.append((operations, what))


@pytest.mark.parametrize("settings", [{}, {"checkpoints": "segment"}, {"checkpoints": "input"}])
@pytest.mark.parametrize("trained", ["all", "upper"])
def test_the_parts_are_the_whole(settings: dict[str, Any], trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(hf_fpdt.model.apply, "StepProgress", lambda peak: told)
    model = tiny("llama", num_hidden_layers=5)
    if trained == "upper":
        model.requires_grad_(False)
        model.model.layers[3:].requires_grad_(True)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=32, progress=True, **settings))
    ids = torch.randint(0, 97, (2, 100))
    for _ in range(2):
        told.totals.clear()
        told.parts.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        (total,) = told.totals
        assert sum(part for part, _ in told.parts) == pytest.approx(total)
        layers = 5 if trained == "all" else 2
        assert [what for _, what in told.parts].count("backward layer 5/5 chunk 1/4") == 1
        assert sum(what.startswith("backward") for _, what in told.parts) == 4 * layers
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert len(told.totals) == 1, "an evaluation is no step"
