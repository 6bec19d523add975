"""A program that hangs must say where, also in what it started itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import run_or_tell

HANGS = """
import pathlib, subprocess, sys, time
def waits_for_its_child(child): child.wait()
def waits_for_nothing(up): up.touch(); time.sleep(600)
if sys.argv[2:]:
    print("the child is up", flush=True); waits_for_nothing(pathlib.Path(sys.argv[1]))
waits_for_its_child(subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"], start_new_session=True))
"""


def test_a_program_that_hangs_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, up = tmp_path / "hangs.py", tmp_path / "up"
    script.write_text(HANGS)

    class Popen(subprocess.Popen[str]):
        """Its time limit begins when it hangs, however long it took to start."""

        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
            while timeout is not None and self.poll() is None and not up.exists():
                time.sleep(0.02)
            return super().communicate(input, timeout)

    monkeypatch.setattr("tests.helpers.processes.subprocess.Popen", Popen)
    with pytest.raises(AssertionError) as told:
        run_or_tell([sys.executable, str(script), str(up)], environment=os.environ, timeout_s=0.5)
    for line in ("no end within 0.5 s", "the child is up", "in waits_for_its_child", "in waits_for_nothing"):
        assert line in str(told.value)


def test_one_that_ends_gives_what_it_printed() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run_or_tell([sys.executable, "-c", code], environment=os.environ, timeout_s=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
