"""TAB, in a real bash that has read what `hf-fpdt --print-completion bash` printed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from hf_fpdt.commands.main import main
from hf_fpdt.config import CHECKPOINT_POLICIES

# Calls what the script registered as bash does on TAB: with the words so far, the last one unfinished.
ON_TAB = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
registered=$(complete -p hf-fpdt)
[[ "$registered" =~ -F\\ ([^ ]+) ]] && "${{BASH_REMATCH[1]}}" hf-fpdt 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Holds the script, a file and a folder."""
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "my-plan.png").touch()
    (tmp_path / "my-model").mkdir()
    return tmp_path


def tab(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    script = ON_TAB.format(script=folder / "script", words=shlex.join(["hf-fpdt", *words]))
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_commands_options_and_choices_are_completed(folder: Path) -> None:
    assert tab(folder, "") == {"check", "plan", "trace", "bench", "finetune", "eval"}
    assert tab(folder, "pl") == {"plan"}
    assert tab(folder, "plan", "--host") == {"--host-mem", "--host-weights"}
    assert tab(folder, "plan", "--host-mem", "128", "--checkpoints", "") == set(CHECKPOINT_POLICIES)
    assert "--host-mem" not in tab(folder, "bench", "--")
    assert {"--max_length", "--learning_rate", "--lr_scheduler_type"} <= tab(folder, "finetune", "--")
    assert tab(folder, "eval", "--dtype", "") == {"auto", "float32", "bfloat16"}


@pytest.mark.parametrize(
    "words",
    ["plan --plot", "plan --rates", "check --rates", "trace --from", "trace --out", "trace --json"]
    + ["bench --csv", "bench --json"],
)
def test_paths_are_completed(words: str, folder: Path) -> None:
    assert tab(folder, *words.split(), "my") == {"my-plan.png", "my-model"}


def test_a_model_is_a_folder(folder: Path) -> None:
    for command in ("check", "plan", "trace", "bench"):
        assert tab(folder, command, "my") == {"my-model"}
    assert tab(folder, "plan", "--json", "my") == {"my-model"}
