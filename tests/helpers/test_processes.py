"""A program that hangs must say where, also in what it started itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run_or_tell

HANGS = """
import subprocess, sys, time
def waits_for_its_child(child): child.wait()
def waits_for_nothing(): time.sleep(60)
if sys.argv[1:]:
    print("the child is up", flush=True); waits_for_nothing()
waits_for_its_child(subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True))
"""


def test_a_program_that_hangs_says_where(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    with pytest.raises(AssertionError) as told:
        run_or_tell([sys.executable, str(script)], environment=os.environ, timeout_s=2)
    for line in ("no end within 2 s", "the child is up", "in waits_for_its_child", "in waits_for_nothing"):
        assert line in str(told.value)


def test_one_that_ends_gives_what_it_printed() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run_or_tell([sys.executable, "-c", code], environment=os.environ, timeout_s=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
