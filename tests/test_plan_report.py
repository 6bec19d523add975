"""`hf-fpdt plan`: a model's sizes from its configuration, and what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from hf_fpdt.cli import main
from hf_fpdt.fit import GIB, Machines, fit
from hf_fpdt.plan_report import _layers, _limit, as_json, as_text, training_of
from hf_fpdt.rates import GPUS
from hf_fpdt.shapes import build_random, llama_8b, with_layers

TINY = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_fpdt.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("lora", [True, False])
def test_sizes_are_those_of_the_model(lora: bool) -> None:

    training = training_of(TINY, lora=lora)
    model = build_random(TINY, "cpu", torch.bfloat16, lora)
    weights = training.weights
    assert weights.total == sum(p.numel() for p in model.parameters())
    assert weights.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights.outside == 2 * 1024 * 256 + 256
    assert training.model.layers == 4 and training.model.gated and training.model.head_dim == 32
    assert 4 * training.model.layer_parameters + weights.outside == weights.total
    layer = max(sum(p.numel() for p in part.parameters() if p.requires_grad) for part in layers_of(model))
    outside = weights.trained - 4 * layer
    assert weights.largest_trained == max(layer, outside) and (outside == 0) == lora


def test_the_shape_of_llama_8b_has_its_parameters() -> None:
    training = training_of(with_layers(llama_8b(), 1), lora=False)
    assert training.model.layer_parameters == 218_112_000 and training.weights.outside == 1_050_677_248


def test_the_command_plans_for_a_folder_and_says_what_lies_where(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    done = run(str(tmp_path), "--host-mem", "16", "--seq-len", "64K", "--chunk-tokens", "4K", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    machines = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=16 * GIB)

    expected = fit(replace(training_of(TINY, lora=True), chunk_tokens=4096), machines, 2**16)
    assert told == json.loads(json.dumps(as_json(expected, {})))
    assert told["exchange_seconds"] == told["gather_seconds"] == 0
    assert told["tokens"] == 65_536 and told["inputs_kept"] == told["layers"] == 4
    text = as_text(expected, machines, {"a quarter more host memory": 2**20})
    assert "exchanges" not in text
    for part in ("65,536 tokens on 1 x H100 80GB", "strict MFU", "activations", "hosts, pinned", "1,048,576 tokens"):
        assert part in text


def test_without_a_length_it_finds_the_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--host-mem", "8", "--gpus", "2", "--gpu", "a100-40"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "longer with" in text and "a quarter more GPU memory" in text and "2 x A100 40GB" in text
    assert "ends by               host memory" in text or "ends by               GPU memory" in text


def test_layers_are_named_by_runs_and_what_helps_most_is_the_limit() -> None:
    assert _layers((True,) * 3) == "3 of 3" and _layers((False,) * 3) == "0 of 3"
    assert _layers((True, False, True, True, True, False, True, True)) == "6 of 8: layers 0, 2-4, 6-7"
    helps = {"a quarter more host memory": 5, "a quarter more GPU memory": 7, "twice the GPUs and hosts": 9}
    assert _limit(helps) == "GPU memory" and _limit({**helps, "a quarter more host memory": 8}) == "host memory"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host-mem", "128", "--gpus", "3"], "32 query heads"),
        (["--host-mem", "8", "--gpu", "a100-40", "--seq-len", "1M"], "Ways out"),
        (["--host-mem", "lots"], "A number of GiB"),
        ([], "--host-mem"),
        (["no/such/model", "--host-mem", "8"], "no/such/model"),
    ],
)
def test_mistakes_end_with_status_2_and_without_a_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fpdt.cli_options.SHAPES", {"llama-8b": lambda: with_layers(llama_8b(), 2)})
    try:
        status = main(["plan", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error


def test_weights_that_are_sharded_are_told_beside_exchanges() -> None:
    machines = Machines(gpu=GPUS["h100"], gpus=2, host_bytes=16 * GIB, sharded=True)
    found = fit(replace(training_of(TINY, lora=True), chunk_tokens=4096), machines, 2**16)
    found = replace(found, exchange_seconds=12.34, gather_seconds=5.67)
    assert "exchanges             12.3 s of the step, computation waits; weights and gradients 5.7 s beside it" in (
        as_text(found, machines, {})
    )
    assert as_json(found, {})["gather_seconds"] == 5.67


def test_without_host_memory_it_says_what_a_length_needs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--shape", "llama-8b", "--gpus", "4", "--seq-len", "2M"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hidden = 2 * 1024**2 // 4 * 4096 * 2  # bytes of a rank's hidden states
    lse = 2 * 1024**2 * 8 * 4
    kept = 4 * 32 * (2 * hidden + lse)
    assert found["host_bytes"] + 4 * found["device_bytes"]["checkpoints"] == pytest.approx(kept, rel=0.01)
    assert found["least_host_bytes"] < found["host_bytes"] and found["seconds_with_least"] > found["seconds"]
    assert found["seconds"] > found["exchange_seconds"] > found["gather_seconds"] == 0
    assert main(arguments) == 0
    text, exchanges = capsys.readouterr().out, f"{found['exchange_seconds']:.1f} s of the step, computation waits\n"
    assert "least host memory" in text and f"  exchanges             {exchanges}" in text
    assert f"under {found['seconds'] - found['exchange_seconds']:,.1f} s of computation" in text
    assert main(["plan", "--shape", "llama-8b"]) == 2 and "--host-mem is needed" in capsys.readouterr().err
