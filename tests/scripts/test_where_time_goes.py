"""Kernels of a small step by kind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import where_time_goes


def test_a_steps_kernels_are_listed_by_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "128")
    options = ["--layers", "1", "--seq-len", "512", "--documents", "lognormal:100,1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["where_time_goes.py", *options])
    where_time_goes.main()
    first, *_, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("llama-8b, 1 layers, CPU, {'host_memory_gib'")
    assert last.startswith("512 tokens: ") and "idle" not in last  # of a CPU that says nothing
    assert re.search(r"attention \d+\.\d", last) and re.search(r"copies, casts \d+\.\d", last)
    (kernels,) = tmp_path.iterdir()
    milliseconds, calls = zip(*(line.split()[:2] for line in kernels.read_text().splitlines()[1:]), strict=True)
    assert [float(ms) for ms in milliseconds] == sorted(map(float, milliseconds), reverse=True)
    assert min(map(int, calls)) > 0


def test_what_overlaps_counts_once() -> None:
    assert where_time_goes.union([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 5.0
