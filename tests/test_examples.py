"""Each example and the quickstart run from a shell, and their losses fall where they train long enough to say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.helpers.app_support import ROOT, run_python

MAX_EXAMPLE_LINES = 80
EXAMPLES = ("plain_loop", "with_trainer", "lora")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns(name: str) -> None:
    done = run_python(ROOT / "examples" / f"{name}.py", "--steps", "3", "--length", "1024")
    assert done.returncode == 0, done.stderr
    if name == "with_trainer":
        losses = done.stdout.rpartition("losses:")[2].split()
    else:
        losses = re.findall(r"step \d+: loss ([\d.]+)", done.stdout)
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])
    if name == "plain_loop":  # it shows that chunks change nothing
        shown = re.search(r"([\d.]+) whole, ([\d.]+) chunk by chunk", done.stdout)
        assert shown is not None and float(shown[1]) == pytest.approx(float(shown[2]), abs=1e-5)


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert set(lengths) == {f"{name}.py" for name in (*EXAMPLES, "tiny_text")}
    assert max(lengths.values()) <= MAX_EXAMPLE_LINES


def test_quickstart_in_its_tiny_size(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_FPDT_NO_VENV": "1", "OMP_NUM_THREADS": "2"}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--tiny", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| 512–1K" in done.stdout and "YaRN only" in done.stdout
    assert (tmp_path / "out" / "extended" / "loss_by_position.png").is_file()
    assert (tmp_path / "out" / "small-llama-512" / "model.safetensors").is_file()


def test_quickstart_refuses_an_unknown_option() -> None:
    done = subprocess.run(["bash", str(ROOT / "scripts" / "quickstart.sh"), "--huge"], capture_output=True, text=True)
    assert done.returncode == 2 and "--tiny" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_what_accelerate_takes(path: Path) -> None:
    """Read by accelerate itself; FSDP of version 2 without its own activation checkpointing, which FPDT refuses."""
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_gpu": 1, "one_node_ddp_lora": 4, "one_node_fsdp2": 8}.get(path.stem, 16)
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
