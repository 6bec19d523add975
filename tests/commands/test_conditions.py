"""Of what code a measurement says that it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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
