"""`hf-fpdt finetune --quantize`: trained, gone on with, evaluated and merged over the quantised base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_fpdt.commands.main import main
from hf_fpdt.model.weights.packing import bitsandbytes_config
from hf_fpdt.model.weights.quantised import is_quantised
from tests.helpers.app_support import stories, write_jsonl, write_tiny_checkpoint
from tests.helpers.quantised import dequantised_twin

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


def command(base: Path, output: Path, *words: str) -> list[str]:
    data = write_jsonl(output.parent / "data.jsonl", stories(6, lines=80))
    sizes = "--eval_fraction 0.3 --max_length 1K --warmup_steps 0 --lr 1e-2 --lora_r 4 --use_cpu --chunk_tokens 256"
    return ["finetune", *f"--model {base} --data {data} --output {output} {sizes}".split(), *words]


@pytest.fixture(scope="module")
def output(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "run"
    words = ["--lr_scheduler_type", "constant", "--save_steps", "1", "--quantize", "nf4"]
    assert main(command(base, folder, "--max_steps", "1", *words)) == 0
    assert main(["finetune", "--resume", "--output_dir", str(folder), "--max_steps", "3", "--merge"]) == 0
    return folder


def quantised_base(base: Path) -> Any:
    how: dict[str, Any] = {"quantization_config": bitsandbytes_config("nf4", torch.float32), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(base, **how)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(200)[None] % 300).logits
    return found


def test_it_trains_and_goes_on_over_the_quantised_base(base: Path, output: Path) -> None:
    run = json.loads((output / "run.json").read_text())
    assert run["arguments"]["quantize"] == "nf4" and run["steps"] == 3 and len(run["training_losses"]) == 3
    assert run["held_out_loss"]["after"] < run["held_out_loss"]["before"]
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert run["parameters"] - run["trained_parameters"] == weights


def test_the_adapter_loads_on_the_quantised_and_on_the_plain_base(base: Path, output: Path) -> None:
    twin = PeftModel.from_pretrained(dequantised_twin(quantised_base(base), torch.float32), output)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    assert 1e-4 < (logits(plain) - logits(twin)).abs().max() < 1.0
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert not any(map(is_quantised, merged.modules())) and not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(twin), rtol=0, atol=1e-5)


def test_the_cards_code_loads_it_over_what_it_was_trained_on(output: Path) -> None:
    text = (output / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "NF4" in text and "quantization_config" in blocks[-1]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert any(map(is_quantised, names["model"].modules()))


def test_eval_takes_the_adapter_over_a_quantised_base(
    base: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = output.parent / "data.jsonl", output.parent / "eval"
    words = f"--data {data} --max_length 1K --output_dir {folder} --use_cpu --eval_windows 2".split()
    assert main(["eval", "--model", str(output), "--quantize", "nf4", *words]) == 0
    quantised = (folder / "loss_by_position.csv").read_text()
    assert "was trained with" not in capsys.readouterr().out
    assert main(["eval", "--model", str(output), *words]) == 0
    assert "was trained with --quantize nf4 and is measured with --quantize none" in capsys.readouterr().out
    assert quantised != (folder / "loss_by_position.csv").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quantize", "nf4", "--full"], "--quantize nf4: --full trains every weight"),
        (["--quantize", "int8", "--fsdp", "full_shard"], "--quantize int8: FSDP cannot shard"),
        (["--quantize", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    base: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, tmp_path / "run", *words)) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_other_bits_is_not_gone_on_with(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--resume", "--output_dir", str(output), "--quantize", "int8"]) == 2
    assert "--quantize was nf4, is int8" in capsys.readouterr().err


def test_weights_on_the_host_give_the_same_run(base: Path, output: Path, tmp_path: Path) -> None:
    words = ["--lr_scheduler_type", "constant", "--quantize", "nf4", "--max_steps", "3", "--merge", "--host_weights"]
    assert main(command(base, tmp_path / "run", *words)) == 0
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "run", output))
    assert ours["training_losses"] == theirs["training_losses"] and ours["held_out_loss"] == theirs["held_out_loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(logits(merged), logits(AutoModelForCausalLM.from_pretrained(output / "merged")))
