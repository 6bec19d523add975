"""Of what code a measurement, and a report of a problem, say that they are."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fpdt
import hf_fpdt.commands.main
from hf_fpdt.commands.conditions import commit

ROOT = Path(__file__).resolve().parents[2]


def test_the_commit_is_the_checkouts_or_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_FPDT_COMMIT", raising=False)
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        assert commit() == subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    else:
        assert commit() == "unknown"
    monkeypatch.setenv("HF_FPDT_COMMIT", "1234567")
    assert commit() == "1234567"


def test_version_is_said_when_the_module_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-fpdt", "--version"])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_fpdt.commands.main", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"hf-fpdt {hf_fpdt.__version__} (torch ")
