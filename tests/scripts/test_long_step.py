"""The step of the headline: the same script at a small size, and its refusal before there are weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import long_step
import pytest
import torch
from long_step import Text, parse, predict
from transformers import LlamaConfig

from hf_fpdt import FPDTPlugin
from hf_fpdt.commands.main import main
from tests.commands.bench.test_bench import SIZES

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_long_step_follows_a_short_one_and_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig(**{**SIZES, "vocab_size": 256}, num_key_value_heads=2).save_pretrained(tmp_path)
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "128")
    (tmp_path / "text.txt").write_text("All the world's a stage. " * 200)
    out = tmp_path / "out" / "row.json"
    options = ["--model", str(tmp_path), "--random", "--seq-len", "1024", "--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", ["long_step.py", *options, "--steps", "2", "--out", str(out)])
    train, trained = long_step.train, []

    def noted(model: Any, ids: Any, lengths: Any, *rest: Any) -> Any:
        trained.extend(lengths)
        return train(model, ids, lengths, *rest)

    monkeypatch.setattr(long_step, "train", noted)
    long_step.main()
    assert trained == [2 * 128 + 64, 1024, 1024]
    row = json.loads(out.read_text())
    assert row["tokens"] == 1024 and row["settings"]["chunk_tokens"] == 128 and row["settings"]["sp_size"] == 1
    steps = row["measured"]["steps"]
    assert [step["step"] for step in steps] == [2, 3] and all(4 < step["loss"] < 7 for step in steps)
    for step in steps:
        assert step["tokens_per_second"] * step["step_seconds"] == pytest.approx(1024)


def test_a_forward_pass_alone_keeps_what_a_step_keeps_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaConfig(**{**SIZES, "vocab_size": 256}, num_key_value_heads=2).save_pretrained(tmp_path)
    for name, value in (("CHUNK_TOKENS", "128"), ("DEVICE_BUDGET_GIB", "0")):
        monkeypatch.setenv(f"FPDT_{name}", value)
    (tmp_path / "text.txt").write_text("All the world's a stage. " * 200)
    options = ["--model", str(tmp_path), "--random", "--seq-len", "1024", "--text", str(tmp_path / "text.txt")]
    rows, trainers = {}, []
    kept = long_step.measured

    def noted(trainer: Any, *rest: Any) -> Any:
        trainers.append(trainer)
        return kept(trainer, *rest)

    monkeypatch.setattr(long_step, "measured", noted)
    for extra in ((), ("--forward-only",)):
        out = tmp_path / f"{len(extra)}.json"
        monkeypatch.setattr(sys, "argv", ["long_step.py", *options, *extra, "--out", str(out)])
        long_step.main()
        rows[extra] = json.loads(out.read_text())["measured"]
    whole, half = rows.values()
    step, forward = whole["steps"][0], half["steps"][0]
    assert forward["loss"] == step["loss"] and forward["host_gib"] == step["host_gib"] > 0
    assert "tokens_per_second" in step and not {"tokens_per_second", "grad_norm", "strict_mfu"} & set(forward)
    steps = [sorted({int(s["step"]) for s in t.optimizer.state.values()}) for t in trainers]
    assert steps == [[2], [1]], "the optimizer went on from the short step alone"


def test_text_is_cut_in_order_and_too_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(torch.arange(10), [2, 4, 4])
    assert [list(text[i]["input_ids"]) for i in range(3)] == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.setattr(sys, "argv", ["long_step.py", "--text", str(tmp_path / "short.txt")])
    with pytest.raises(SystemExit, match=r"131,072 tokens are wanted and the text has 5"):
        long_step.read_ids(parse(), 131_072)


def test_what_cannot_fit_is_refused_by_the_configuration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["long_step.py", "--seq-len", "768K"])
    options = parse()
    config = long_step.config_of(options, layers=options.layers)
    found = predict(config, options, FPDTPlugin(host_budget_gib=100), H100)
    assert found["tokens"] == 786_432 and 900 < found["seconds"] < 1400
    assert found["host_bytes"] <= 100 * 2**30
    short_chunks = predict(config, options, FPDTPlugin(host_budget_gib=100, chunk_tokens=16_384), H100)
    working = "activations and gradients of a step"
    assert short_chunks["device_bytes"][working] < 0.99 * found["device_bytes"][working]
    on_host = predict(config, options, FPDTPlugin(host_budget_gib=100, device_budget_gib=20), H100)
    kept = on_host["device_bytes"]
    assert 0 < kept["K, V, dK, dV"] + kept["checkpoints"] <= 20 * 2**30 and on_host["seconds"] > found["seconds"]
    with pytest.raises(SystemExit, match=r"error: .*GiB"):
        predict(config, options, FPDTPlugin(host_budget_gib=10), H100)


def test_the_longest_sequence_of_a_smaller_card_and_host_is_that_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "row.json"
    machine = ["--shape", "llama-8b", "--gpu-mem", "24", "--host-mem", "64"]
    monkeypatch.setattr(sys, "argv", ["long_step.py", *machine, "--longest", "--plan-only", "--out", str(out)])
    long_step.main()
    capsys.readouterr()
    assert main(["plan", *machine, "--json"]) == 0
    planned, row = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert row["tokens"] == row["foretold"]["tokens"] == planned["tokens"] > 16_384
    assert row["foretold"]["peak_device_bytes"] == planned["peak_device_bytes"] < 24 * 2**30
    assert row["foretold"]["host_bytes"] == pytest.approx(planned["host_bytes"], rel=0.02)


def test_a_step_on_a_smaller_host_is_shown_beside_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(**{**SIZES, "vocab_size": 256}, num_key_value_heads=2).save_pretrained(tmp_path)
    for name, value in (("CHUNK_TOKENS", "128"), ("DEVICE_BUDGET_GIB", "0")):
        monkeypatch.setenv(f"FPDT_{name}", value)
    (tmp_path / "text.txt").write_text("All the world's a stage. " * 200)
    options = ["--model", str(tmp_path), "--random", "--seq-len", "1024", "--text", str(tmp_path / "text.txt")]
    out, machine = tmp_path / "row.json", ["--gpu-mem", "24", "--host-mem", "8"]
    monkeypatch.setattr(sys, "argv", ["long_step.py", *options, *machine, "--out", str(out)])
    long_step.main()
    row = json.loads(out.read_text())
    assert row["settings"]["host_budget_gib"] == pytest.approx(0.98 * 8 - 6)
    lines = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["1,024 tokens, 0.0 GiB held"] == [] and lines["tokens a chunk"] == ["128.0", "128.0"]
    assert lines["GiB of the GPU at the peak"][1] == "-" and float(lines["seconds"][1]) > 0
    pinned, planned = row["measured"]["pinned_gib"], row["foretold"]["host_bytes"] / 2**30
    assert pinned == pytest.approx(planned, rel=0.05) and planned > 0
