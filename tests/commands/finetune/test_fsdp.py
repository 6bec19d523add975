"""`hf-fpdt finetune` under FSDP2 by the package's own configuration, on two processes: what it saves, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.app_support import ROOT, run_python, stories, write_jsonl, write_tiny_checkpoint

LENGTH = 256
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
# With these the held-out loss is lowest in the middle of the run.
SETTINGS = {"full": "--full --lr 3e-2", "lora": "--lora_r 4 --lr 3e-1"}
SAVED = "--steps 4 --save_steps 2 --save_total_limit 3 --eval_strategy steps --eval_steps 2 --load_best_model_at_end"


def launched(folder: Path, saved: str, *options: str) -> Path:
    """All runs by one launch: each kind whole, and once more from its first checkpoint."""
    model, data = write_tiny_checkpoint(folder / "model"), write_jsonl(folder / "train.jsonl", stories(6))
    held_out = write_jsonl(folder / "held_out.jsonl", [text.upper() for text in stories(3)])
    of_all = f"--model {model} --data {data} --eval_data {held_out} --max-length {LENGTH} --chunk_tokens 64"
    of_all += " --eval_windows 4 --warmup_steps 0 --use_cpu --long_documents cut"
    commands = []
    for kind, settings in SETTINGS.items():
        whole, stopped = str(folder / kind), str(folder / f"{kind}, stopped")
        commands.append(["finetune", *of_all.split(), *settings.split(), *saved.split(), "--output", whole])
        commands += [["stop", whole, stopped, "4"], ["finetune", "--resume", "--output", stopped]]
    config = ROOT / "examples" / "accelerate" / "one_node_fsdp2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", *options]
    script = ROOT / "tests" / "launched" / "commands.py"
    done = run_python(*launch, "--main_process_port", "0", script, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("fsdp"), SAVED)


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def equal(one: Path, other: Path) -> bool:
    weights, others = load_file(one), load_file(other)
    return weights.keys() == others.keys() and all(torch.equal(w, others[name]) for name, w in weights.items())


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_saved_is_the_best_checkpoint(kind: str, folder: Path) -> None:
    losses = facts(folder / kind)["evaluation_losses"]
    assert losses["2"] < losses["4"]
    saved = folder / kind / WEIGHTS[kind]
    assert equal(saved, folder / kind / "checkpoint-2" / WEIGHTS[kind])
    assert not equal(saved, folder / kind / "checkpoint-4" / WEIGHTS[kind])


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_gone_on_with_ends_as_one_that_was_not_stopped(kind: str, folder: Path) -> None:
    whole, stopped = folder / kind, folder / f"{kind}, stopped"
    for name in ("training_losses", "evaluation_losses", "held_out_loss"):
        assert facts(stopped)[name] == facts(whole)[name], name
    assert len(facts(whole)["training_losses"]) == 4 and len(facts(stopped)["step_seconds"]) == 2
    for part in ("", "checkpoint-4"):
        assert equal(whole / part / WEIGHTS[kind], stopped / part / WEIGHTS[kind])


@pytest.mark.parametrize("kind", SETTINGS)
def test_plain_transformers_loads_what_was_saved(kind: str, folder: Path) -> None:
    """And has the loss that the run reports."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / (kind if kind == "full" else "model"))
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    if kind == "lora":
        model = PeftModel.from_pretrained(model, folder / kind)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    texts = [json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    reported = facts(folder / kind)["held_out_loss"]
    assert abs(reported["after"] - reported["before"]) > 0.02
    for label, each in (("before", before), ("after", model)):
        ids = torch.tensor([tokenizer(text).input_ids[:LENGTH] for text in texts])
        with torch.no_grad():
            loss = each.eval()(input_ids=ids, labels=ids).loss.item()
        # Under bfloat16 autocast, and of other windows of the same stories.
        assert loss == pytest.approx(reported[label], abs=0.02), label


def test_a_run_goes_on_from_a_checkpoint_in_shards(tmp_path: Path) -> None:
    """Each process has its own part of weights and of the optimizer; what is saved at the end is whole."""
    launched(tmp_path, "--steps 4 --save_steps 2 --save_total_limit 3", "--fsdp_state_dict_type", "SHARDED_STATE_DICT")
    for kind, weights in WEIGHTS.items():
        whole, stopped = tmp_path / kind, tmp_path / f"{kind}, stopped"
        shards = whole / "checkpoint-2" / "pytorch_model_fsdp_0"
        assert len(list(shards.glob("*.distcp"))) == 2 and not (whole / "checkpoint-2" / weights).exists()
        assert equal(whole / weights, stopped / weights)
        assert facts(stopped)["training_losses"] == facts(whole)["training_losses"]
