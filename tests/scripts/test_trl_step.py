"""The steps of TRL's trainers at a small size: what is timed, what is said, and where lengths end."""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")  # a machine with a GPU may have none; what it runs is not in here
import trl_step

from tests.commands.bench.test_bench import SIZES


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    LlamaConfig(**{**SIZES, "vocab_size": 256}, num_key_value_heads=2).save_pretrained(tmp_path)
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "128")
    return ["--model", str(tmp_path), "--seq-len", "512", "--warm", "160"]


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["trl_step.py", *options, "--out", str(out)])
    trl_step.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def lengths(found: dict[str, Any], who: str) -> list[tuple[int, bool]]:
    return [(row["tokens"], row["short"]) for row in found["rows"] if row["who"] == who]


def test_a_pair_is_timed_with_the_mixin_and_without_until_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sizes: list[str]
) -> None:
    steps_of, alive = trl_step.steps_of, []
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is logged, a model too

    def small_gpu(trainer: Any, loss: str, asked: list[int]) -> Any:
        gc.collect()
        alive.append(sum(type(each) is LlamaForCausalLM for each in gc.get_objects()))
        if asked[-1] == 384:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return steps_of(trainer, loss, asked)

    monkeypatch.setattr(trl_step, "steps_of", small_gpu)
    asked = ("--loss", "dpo", "--plain", "256", "384", "448", "--steps", "2")
    found = measured(monkeypatch, tmp_path / "out" / "dpo.json", *sizes, *asked)
    assert lengths(found, "the mixin") == [(160, True), (512, False), (512, False)]
    assert lengths(found, "TRL alone") == [(160, True), (256, False), (384, False)]
    assert found["longest_plain"] == 256 and found["rows"][-1]["out_of_memory"] == "CUDA out of memory."
    assert alive == [1] * 4, "the model with FPDT takes memory of TRL alone"
    steps = found["rows"][:-1]
    assert all(row["seconds"] > 0 and row["finite"] and abs(row["loss"] - 0.693) < 0.02 for row in steps)
    said = capsys.readouterr().out
    assert "TRL alone         384 tokens: out of GPU memory" in said
    assert "256 tokens were the longest of those tried" in said


def test_sft_is_timed_beside_fpdttrainer_on_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[str]
) -> None:
    found = measured(monkeypatch, tmp_path / "sft.json", *sizes, "--loss", "sft")
    ours, theirs = lengths(found, "the mixin"), lengths(found, "FPDTTrainer")
    assert ours == theirs == [(160, True), (512, False)]
    losses = [row["loss"] for row in found["rows"]]
    assert losses[2:] == pytest.approx(losses[:2], abs=1e-3) and losses[0] != losses[1]
    assert found["ratio"] == pytest.approx(found["rows"][3]["seconds"] / found["rows"][1]["seconds"])


def test_grpo_scores_and_makes_its_loss_as_trl_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[str]
) -> None:
    scores_of, checkpointing = trl_step.scores_of, []

    def noted(trainer: Any, *rest: Any) -> Any:
        rows = scores_of(trainer, *rest)
        checkpointing.append(trainer.model.get_base_model().is_gradient_checkpointing)
        return rows

    monkeypatch.setattr(trl_step, "scores_of", noted)
    found = measured(monkeypatch, tmp_path / "grpo.json", *sizes, "--loss", "grpo", "--plain", "512")
    assert checkpointing == [True] * 4, "TRL alone takes more memory than in its own steps"
    what = [row["what"] for row in found["rows"]]
    assert what == ["old policy", "reference", "loss and gradients"] * 4
    # One completion with an advantage of one, and a policy that is the old one and its reference.
    assert [row["loss"] for row in found["rows"] if "loss" in row["what"]] == pytest.approx([-1.0] * 4, abs=1e-3)
    scores = [row["loss"] for row in found["rows"] if "loss" not in row["what"]]
    assert all(-6 < score < -5 for score in scores)
    only = measured(monkeypatch, tmp_path / "scores.json", *sizes, "--loss", "grpo", "--forward-only")
    assert [row["what"] for row in only["rows"]] == ["old policy", "reference"] * 2
