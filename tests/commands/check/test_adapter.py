"""`hf-fpdt check ADAPTER_FOLDER`: its base, its rotary parameters, and steps that train such an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftConfig
from transformers import AutoConfig

from hf_fpdt.commands.main import main

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 128, "num_hidden_layers": 4}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 2048}
LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4}
DORA = {**LORA, "target_modules": ["q_proj"], "use_dora": True, "lora_dropout": 0.5, "layers_to_transform": [3]}


def base(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model's configuration; weights are not looked at."""
    config = AutoConfig.for_model(name, **{**SIZES, **changes})
    config.save_pretrained(folder / "base")
    return folder / "base"


def adapter(folder: Path, config: PeftConfig, *, rope: dict[str, Any] | None = None, own: bool = False) -> str:
    """Of `folder / "base"`, trained with these rotary parameters.

    Args:
        own: whether the base's configuration, as it was trained with, lies in it.
    """
    config.base_model_name_or_path = config.base_model_name_or_path or str(folder / "base")
    if rope is not None:
        config.auto_mapping = {"rope_parameters": rope}
    config.save_pretrained(str(folder / "adapter"))
    if own:
        AutoConfig.from_pretrained(folder / "base", rope_parameters=rope).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, output in one line and errors."""
    status = main(["check", *words])
    said = capsys.readouterr()
    return status, " ".join(said.out.split()), said.err


@pytest.mark.parametrize(
    ("rope", "own", "words"),
    [
        (
            YARN,
            True,
            ["other rotary parameters than its base has: {'rope_type': 'yarn'", "not {'rope_type': 'default'"],
        ),
        (YARN, False, ["WARNING", "load the base with these in config.rope_parameters"]),
        (PLAIN, True, ["it was trained with the rotary parameters that its base has"]),
        (PLAIN, False, ["it was trained with the rotary parameters that its base has"]),
        (None, False, ["it does not say with which rotary parameters it was trained"]),
    ],
)
def test_another_rope_than_the_bases_is_said(
    rope: Any, own: bool, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base(tmp_path)
    name = adapter(tmp_path, LoraConfig(**LORA), rope=rope, own=own)
    status, out, err = check(capsys, name)
    assert status == 0 and not err and f"adapter {name}: LORA of rank 4, on {folder}" in out, out
    assert all(word in out for word in words) and ("WARNING" in out) == (rope is YARN), out
    assert (f'config=AutoConfig.from_pretrained("{name}")' in out) == (rope is YARN and own)
    assert "lora_A" in out and "right with every kernel that is here: cpu, math" in out, "adapters were trained"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", LoraConfig(**DORA)),
        ("llama", LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"])),
        ("gpt_neox", IA3Config(task_type="CAUSAL_LM")),
        ("qwen3_moe", LoraConfig(**LORA)),  # of experts too, which are parameters
    ],
    ids=["dora", "lora and a head", "ia3", "experts"],
)
def test_an_adapter_of_any_kind_is_tried(
    name: str, config: PeftConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path, name, **({"num_experts": 8, "moe_intermediate_size": 32} if name == "qwen3_moe" else {}))
    status, out, err = check(capsys, adapter(tmp_path, config, rope=PLAIN))
    assert status == 0 and not err and out.count(" right ") >= 4, out


def test_an_adapter_that_fpdt_does_not_train_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path)
    status, out, _ = check(capsys, adapter(tmp_path, LoraConfig(**LORA, alora_invocation_tokens=[5])))
    assert status == 1 and "is not supported: - " in out and "aLoRA" in out, out


def test_a_base_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved, gone = base(tmp_path), str(tmp_path / "gone")
    name = adapter(tmp_path, LoraConfig(**LORA, base_model_name_or_path=gone), rope=PLAIN, own=True)
    status, _, err = check(capsys, name)
    assert status == 2 and err.count("\n") == 1 and "--base-model" in err, err
    assert f"{name} is an adapter for the base {gone!r}, which can't be read: {gone}: there is no such folder" in err
    status, out, _ = check(capsys, name, "--base-model", str(moved))
    assert status == 0 and f"on {moved}" in out


def test_what_is_no_adapter_and_what_is_broken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(base(tmp_path))
    for words, part in (
        ([folder, "--base-model", "m"], f"for a folder with an adapter_config.json; {folder} has none"),
        (["--base-model", "m"], "give the adapter's folder"),
    ):
        assert (found := check(capsys, *words))[0] == 2 and part in found[2], found
    name = adapter(tmp_path, LoraConfig(**LORA))
    for content, part in (("{", "can't be read"), (json.dumps({"peft_type": "LORA"}), "names no base model")):
        (Path(name) / "adapter_config.json").write_text(content)
        assert (found := check(capsys, name))[0] == 2 and part in found[2], found


def test_other_commands_ask_for_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path)
    name = adapter(tmp_path, LoraConfig(**LORA))
    assert main(["plan", name, "--host-mem", "16"]) == 2
    assert "is a PEFT adapter's folder" in capsys.readouterr().err
