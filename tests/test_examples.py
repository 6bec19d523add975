"""Each example and the quickstart run from a shell, and their losses fall where they train long enough to say so."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.helpers.app_support import ROOT, run_python, stories, write_tiny_checkpoint
from tests.helpers.processes import run_or_tell

MAX_EXAMPLE_LINES = 80
WITH_A_TOKENIZER = ("tokenizer_to_adapter", "trl_sft")
EXAMPLES = ("plain_loop", "with_trainer", "lora", "accelerate_loop", "two_processes", *WITH_A_TOKENIZER)
# Run in this process: what takes long to be imported is there.
TRLS = ("trl_agents", "trl_dpo", "trl_grpo")
# Those whose trainer or accelerator is ours say what is done: the chunk and the kernel, what is kept and where.
SAYING = EXAMPLES[3:]
SAID = (
    r"hf_fpdt: \w+, 2 layers in chunks of",
    r"hf_fpdt: attention kernel 'cpu'",
    r"hf_fpdt: .*chunks?: K, V.*; keeps",
)


@pytest.fixture(scope="module")
def text_and_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and two documents."""
    folder = tmp_path_factory.mktemp("text")
    write_tiny_checkpoint(folder / "model")
    for number, text in enumerate(stories(2)):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns(name: str, text_and_model: Path, tmp_path: Path) -> None:
    arguments = ["--steps", "3", "--length", "1024"]
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if name == "two_processes" else ()
    if name in WITH_A_TOKENIZER:
        pytest.importorskip("trl")
        arguments += ["--model", str(text_and_model / "model"), "--data", str(text_and_model / "*.txt")]
        arguments += ["--output", str(tmp_path / "out")]
    done = run_python(*start, ROOT / "examples" / f"{name}.py", *arguments)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"step \d+: loss ([\d.]+)", done.stdout)
    if "losses" in done.stdout:
        losses = re.findall(r"^losses.*?: (.*)", done.stdout, re.MULTILINE)[0].split()
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])
    said = [len(re.findall(line, done.stderr)) for line in SAID]
    assert said == [name in SAYING] * len(SAID), f"once, by the first process: {done.stderr}"
    if name == "plain_loop":  # it shows that chunks change nothing
        shown = re.search(r"([\d.]+) whole, ([\d.]+) chunk by chunk", done.stdout)
        assert shown is not None and float(shown[1]) == pytest.approx(float(shown[2]), abs=1e-5)
    if name in WITH_A_TOKENIZER:
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def rows_of(name: str) -> list[dict[str, object]]:
    """What a line of an example's data looks like."""
    texts = stories(4)
    if name == "trl_agents":
        turns = ("user", "assistant", "tool", "assistant")
        return [{"messages": [{"role": r, "content": t[:80]} for r in turns]} for t in texts]
    if name == "trl_dpo":
        return [{"prompt": t[:60], "chosen": t[60:200], "rejected": t[400:450]} for t in texts]
    return [{"prompt": t[: 60 + 20 * row], "answer": "e story"} for row, t in enumerate(texts)]


@pytest.mark.parametrize("name", TRLS)
def test_an_example_of_trl_trains(
    name: str,
    text_and_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows_of(name))), encoding="utf-8")
    length = "16" if name == "trl_grpo" else "256"
    options = ["--model", str(text_and_model / "model"), "--data", str(data), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [name, *options, "--steps", "3", "--length", length])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    values = [
        float(value) for value in re.findall(r"^(?:losses|rewards): (.*)", capsys.readouterr().out, re.M)[0].split()
    ]
    assert len(values) == 3 and (name == "trl_grpo" or values[-1] < values[0])
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_recipe_for_agents_trains(text_and_model: Path, tmp_path: Path) -> None:
    """Trajectories are made, packed and learned with the recipe's own options, in its quantisation."""
    pytest.importorskip("bitsandbytes")
    recipe, model = ROOT / "examples" / "agent_128k", tmp_path / "model"
    shutil.copytree(text_and_model / "model", model)
    said = "{% set content = message.content ~ (message.tool_calls | tojson if message.tool_calls else '') %}"
    marked = "{% if message.role == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}{% else %}"
    marked += "{{ content }}{% endif %}"
    template = "{% for message in messages %}" + said + marked + "{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    data, out = tmp_path / "trajectories.jsonl", tmp_path / "out"
    made = run_python(recipe / "make_trajectories.py", "--count", "12", "--scale", "0.002", "--output", data)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    calls = [turn["tool_calls"][0]["function"]["name"] for turn in rows[0]["messages"] if "tool_calls" in turn]
    assert (
        len(rows) == 12 and calls[:2] == ["search", "read"] and "is defined in" in rows[0]["messages"][-1]["content"]
    )
    options: list[str | Path] = [
        "--config",
        recipe / "train.yaml",
        "--model",
        model,
        "--data",
        data,
        "--output_dir",
        out,
    ]
    small = ["--max_length", "8K", "--gradient_accumulation_steps", "1", "--eval_docs", "2", "--use_cpu"]
    done = run_python("-m", "hf_fpdt.commands.finetune", *options, *small)
    assert done.returncode == 0, done.stderr
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["arguments"]["quantize"] == "nf4" and (out / "adapter_model.safetensors").is_file()


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert set(lengths) == {f"{name}.py" for name in (*EXAMPLES, *TRLS, "tiny_text")}
    assert max(lengths.values()) <= MAX_EXAMPLE_LINES


def test_quickstart_in_its_tiny_size(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_FPDT_NO_VENV": "1", "OMP_NUM_THREADS": "2"}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--tiny", "--output", str(tmp_path / "out")]
    done = run_or_tell(command, environment=environment)
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
