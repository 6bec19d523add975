"""`hf-fpdt finetune` as a user runs it: files, facts, a result that loads and repeats its loss, and mistakes."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_fpdt.commands.finetune.run import with_lora
from hf_fpdt.commands.main import main
from hf_fpdt.commands.options import UserMistake
from tests.helpers.app_support import run_python, stories, write_jsonl, write_tiny_checkpoint
from tests.helpers.recurrent import recurrent

MAX_LENGTH_TOKENS = 1024
YARN = ("--rope_scaling", "yarn")
HF_FPDT = ("-m", "hf_fpdt.commands.main", "finetune")
LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)
RESULT_FILES = (
    "README.md",
    "run.json",
    "loss_by_position.png",
    "loss_by_position.csv",
    "config.json",
    "tokenizer.json",
)


FULL = ("--full", "--save_steps", "1")


@dataclass(frozen=True)
class Inputs:
    model: Path
    train: Path
    held_out: Path


@dataclass(frozen=True)
class Result:
    output: Path
    printed: str

    @property
    def facts(self) -> dict:
        return json.loads((self.output / "run.json").read_text())

    @property
    def card(self) -> str:
        return (self.output / "README.md").read_text()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(
        write_tiny_checkpoint(folder / "model"),
        write_jsonl(folder / "train.jsonl", stories(6, lines=80)),
        write_jsonl(folder / "held_out.jsonl", [text.upper() for text in stories(3, lines=120)]),
    )


def arguments(inputs: Inputs, output: Path, *extra: str) -> list[str]:
    return [
        *("--model", str(inputs.model), "--data", str(inputs.train), "--eval_data", str(inputs.held_out)),
        *("--max-length", "1K", "--chunk_tokens", "256", "--steps", "2", "--warmup_steps", "0", "--lr", "1e-2"),
        *("--long_documents", "cut", "--lora_r", "4", "--use_cpu", "--output", str(output), *extra),
    ]


def finetuned(inputs: Inputs, output: Path, *extra: str, start: tuple[str, ...] = HF_FPDT) -> Result:
    done = run_python(*start, *arguments(inputs, output, *extra))
    assert done.returncode == 0, done.stderr
    return Result(output, done.stdout)


@pytest.fixture(scope="module")
def lora(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return finetuned(inputs, tmp_path_factory.mktemp("runs") / "lora", *YARN)


@pytest.fixture(scope="module")
def full(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Result:
    start = (*LAUNCH, "--num_processes", "1", "--cpu", "-m", "hf_fpdt.commands.finetune")
    output = tmp_path_factory.mktemp("runs") / "full"
    return finetuned(inputs, output, *YARN, *FULL, "--eval_strategy", "steps", "--eval_steps", "2", start=start)


def held_out_loss(model: torch.nn.Module, inputs: Inputs) -> float:
    """The mean loss over the same windows, by the model's own loss on whole sequences."""
    from transformers import AutoTokenizer

    from hf_fpdt.commands.finetune.sources import read_documents
    from hf_fpdt.commands.finetune.windows import WindowDataset, document_tokens, plan_eval_windows, tokenise

    tokenised = tokenise(
        read_documents([str(inputs.held_out)]), AutoTokenizer.from_pretrained(inputs.model), "held out"
    )
    windows = WindowDataset(tokenised, plan_eval_windows(document_tokens(tokenised), MAX_LENGTH_TOKENS, 16, 16))
    rows = torch.stack([windows[index]["input_ids"] for index in range(len(windows))])
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


def executed_loading_code(card: str) -> dict:
    """Run the card's own code block; returns the names it defines."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict = {}
    exec(code.group(1), names)
    return names


def test_two_processes_that_share_every_sequence_give_the_same_run(
    lora: Result, inputs: Inputs, tmp_path: Path
) -> None:
    """Losses of every step, and the held-out loss at each position, as from one process."""
    start = (*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "scripts/finetune.py")
    shared = finetuned(inputs, tmp_path / "shared", *YARN, "--sp-size", "2", start=start)
    assert shared.facts["training_losses"] == pytest.approx(lora.facts["training_losses"], abs=1e-4)
    assert shared.facts["held_out_loss"] == pytest.approx(lora.facts["held_out_loss"], abs=1e-4)
    for name in ("loss_by_position.csv", "loss_by_position.png", "adapter_model.safetensors", "config.json"):
        assert (shared.output / name).stat().st_size > 0
    assert "| processes | 2, 2 a sequence |" in shared.card
    assert shared.printed.count("training step 1 of 2") == 1, "each line is printed once, by the first process"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_writes_every_promised_file(kind: str, request: pytest.FixtureRequest) -> None:
    output = request.getfixturevalue(kind).output
    weights = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[kind]
    missing = [name for name in (*RESULT_FILES, weights) if not (output / name).is_file()]
    assert not missing
    assert (output / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_cards_loading_code_gives_the_reported_loss(
    kind: str, inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue(kind)
    model = executed_loading_code(result.card)["model"]
    reported = result.facts["held_out_loss"]
    assert held_out_loss(model, inputs) == pytest.approx(reported["after"], abs=2e-5)
    assert abs(reported["after"] - reported["before"]) > 1e-3  # else loading the stock model would pass as well


def test_the_adapter_without_its_rotary_parameters_does_not(lora: Result, inputs: Inputs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(inputs.model)
    loss = held_out_loss(PeftModel.from_pretrained(stock, lora.output), inputs)
    assert abs(loss - lora.facts["held_out_loss"]["after"]) > 1e-4


def test_adapters_of_a_bfloat16_model_train_in_float32_under_autocast(inputs: Inputs, tmp_path: Path) -> None:
    done = run_python(*HF_FPDT, *arguments(inputs, tmp_path / "half", "--dtype", "bfloat16"))
    assert done.returncode == 0, done.stderr
    adapters = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    assert "slower code" not in done.stderr, "LoRA is fused"
    assert "warning: windows have up to 1,024 tokens" in done.stdout
    losses = json.loads((tmp_path / "half" / "run.json").read_text())["training_losses"]
    assert losses[1] < losses[0]


def test_before_is_the_stock_model(lora: Result, inputs: Inputs) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(inputs.model)
    assert held_out_loss(stock, inputs) == pytest.approx(lora.facts["held_out_loss"]["before"], abs=2e-5)


def test_reports_each_phase_and_step(lora: Result) -> None:
    for words in ("6 training documents", "evaluating before: window", "training step 2 of 2: loss", "tokens/s"):
        assert words in lora.printed


def test_run_json_holds_the_facts(lora: Result) -> None:
    facts = lora.facts
    assert facts["arguments"]["max_length"] == MAX_LENGTH_TOKENS
    assert len(facts["training_losses"]) == 2 and all(map(math.isfinite, facts["training_losses"]))
    assert facts["data"]["eval_length_tokens"] == MAX_LENGTH_TOKENS and facts["data"]["documents"] == 6
    assert facts["training_tokens_per_s"] > 0 and torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["rope"]["after"]["rope_type"] == "yarn" and facts["rope"]["after"]["factor"] == 2.0
    assert facts["trained_parameters"] < facts["parameters"]


def test_card_agrees_with_run_json(lora: Result) -> None:
    card, facts = lora.card, lora.facts
    assert f"{facts['held_out_loss']['after']:.3f}" in card and "LoRA rank 4" in card
    assert "'rope_type': 'yarn'" in card and "512–1K" in card
    assert "$" not in card  # no place of the template was left


def test_saved_full_model_has_the_rope_it_was_trained_with(full: Result) -> None:
    rope = json.loads((full.output / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["original_max_position_embeddings"] == 512


def test_evaluation_during_training_is_on_the_held_out_windows(full: Result) -> None:
    assert "evaluation after step 2: held-out loss" in full.printed
    facts = full.facts
    assert facts["evaluation_losses"]["2"] == pytest.approx(facts["held_out_loss"]["after"], abs=2e-5)


OTHER_SETTINGS = {
    "rope scaling": (["--rope_scaling", "none"], ["--rope_scaling was yarn, is none"]),
    "length": (["--max_length", "512"], ["--max_length was 1024, is 512"]),
    "seed": (["--seed", "7"], ["--seed was 0, is 7"]),
    "schedule": (["--lr_scheduler_type", "constant"], ["--lr_scheduler_type was cosine_warmup_with_min_lr, is const"]),
    "LoRA": (["--full", "no"], ["--full was True, is False", "--lora_r was None, is 4"]),
    "batch": (["--gradient_accumulation_steps", "2"], ["was 1, is 2"]),
    "dtype": (["--dtype", "bfloat16"], ["--bf16 was False, is True", "--dtype was float32, is bfloat16"]),
}


@pytest.mark.parametrize("kind", OTHER_SETTINGS)
def test_resume_with_other_settings_is_refused_by_name(
    kind: str, full: Result, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, words = OTHER_SETTINGS[kind]
    before = content(full.output)
    command = arguments(inputs, full.output, *YARN, *FULL, "--resume", "--steps", "4", *extra)
    assert_refused(command, ["--resume", "started with other settings", *words], capsys)
    assert content(full.output) == before


@pytest.fixture
def stopped(full: Result, tmp_path: Path) -> Path:
    """A copy of the run as it is left by a stop before its last step."""
    folder = shutil.copytree(full.output, tmp_path / "stopped")
    shutil.rmtree(folder / "checkpoint-2")
    return folder


def test_resume_with_other_documents_is_refused(
    stopped: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same names: a file that has grown since."""
    text = inputs.train.read_text()
    inputs.train.write_text(text + text.replace("story", "saga").splitlines()[0] + "\n")
    try:
        command = arguments(inputs, stopped, *YARN, *FULL, "--resume")
        assert_refused(command, ["--resume", "other data: 6 documents, now 7"], capsys)
    finally:
        inputs.train.write_text(text)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_past_its_last_step_does_nothing(
    full: Result, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(full.output)
    for steps in ("2", "1"):
        assert main(["finetune", *arguments(inputs, full.output, *YARN, *FULL, "--resume", "--steps", steps)]) == 0
        printed = capsys.readouterr().out
        assert f"checkpoint-2 is of step 2, and --max_steps is {steps}" in printed and "loaded" not in printed
    assert content(full.output) == before


def test_checkpoints_of_another_run_are_not_mixed_with_this_ones(
    full: Result, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(inputs, full.output, *YARN, *FULL, "--overwrite")
    assert_refused(command, ["--overwrite", "checkpoint-2 is of another run", "--resume"], capsys)


def test_resume_goes_on_from_the_last_checkpoint(full: Result, inputs: Inputs, stopped: Path) -> None:
    evaluated = ("--eval_strategy", "steps", "--eval_steps", "2")
    resumed = finetuned(inputs, stopped, *YARN, *FULL, *evaluated, "--resume")
    assert "training step 2 of 2" in resumed.printed and "training step 1 of 2" not in resumed.printed
    assert resumed.facts["training_losses"] == full.facts["training_losses"]
    whole, again = (load_file(folder / "model.safetensors") for folder in (full.output, stopped))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_evaluation_of_the_adapters_folder_is_that_of_the_run(
    lora: Result, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(inputs.held_out), "--max-length", "1K", "--chunk-tokens", "256")
    assert main(["eval", "--model", str(lora.output), *data, "--output-dir", str(tmp_path / "out")]) == 0
    table = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert float(table[-1][3]) == pytest.approx(lora.facts["held_out_loss"]["after"], abs=6e-4)
    kept = [(folder / "loss_by_position.csv").read_text().splitlines() for folder in (lora.output, tmp_path / "out")]
    assert [row.rpartition(",")[2] for row in kept[0][1:]] == [row.rpartition(",")[2] for row in kept[1][1:]]
    before = content(lora.output)
    assert main(["eval", "--model", str(lora.output), *data, "--output-dir", str(lora.output)]) == 2
    assert_one_line(capsys.readouterr().err, ["--output_dir", "holds a run of hf-fpdt finetune"])
    assert content(lora.output) == before


def test_what_is_left_out_is_said_and_padding_needs_no_token_of_its_own(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without matplotlib the run has no figure, says so, and its card shows none."""
    from transformers import AutoTokenizer

    model = shutil.copytree(inputs.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the model has no embedding of it
    tokenizer.save_pretrained(model)
    data = tmp_path / "data"
    data.mkdir()
    (data / "table.jsonl").write_text(inputs.train.read_text().splitlines()[0] + '\n{"broken\n')
    (data / "LICENSE").write_text("free")
    sources = ("--model", str(model), "--data", str(data))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    one_of_two_is_short = ("--max-length", "400", "--per_device_train_batch_size", "2", "--steps", "1")
    assert main(["finetune", *arguments(inputs, tmp_path / "output", *sources, *one_of_two_is_short)]) == 0
    facts = json.loads((tmp_path / "output" / "run.json").read_text())
    data_facts = facts["data"]
    assert data_facts["windows"] == 2 and data_facts["filled"] < 1 and data_facts["cut_documents"] == 1
    assert math.isfinite(facts["training_losses"][0])
    left_out = facts["data"]["left_out"]
    assert [line.split(",")[0] for line in left_out] == [
        "broken lines left out: 1",
        "files of other kinds left out: 1 (no ending 1)",
    ]
    printed = capsys.readouterr().out
    assert all(line in printed for line in left_out)
    assert "no loss_by_position.png: the picture is drawn by matplotlib, which is not installed" in printed
    assert not (tmp_path / "output" / "loss_by_position.png").exists()
    assert "![" not in (tmp_path / "output" / "README.md").read_text()


MISTAKES = [
    (["--max-length", "lots"], ["--max_length", "'lots'", "1M"]),
    (["--model", "no/such-model"], ["--model", "no/such-model", "no folder no/such-model here either"]),
    (["--model", "./no-model"], ["./no-model: there is no such folder"]),
    (["--data", "no_such_file.jsonl"], ["no_such_file.jsonl", "existing"]),
    (["--text-column", "body"], ["--text_column", "'body'", "text"]),
    (["--eval-data", "no_such_file.txt"], ["no file or folder no_such_file.txt"]),
    (["--output", "/proc/version/out"], ["--output_dir", "/proc/version/out", "can't be made or written", "give one"]),
    (["--output", "/proc/out"], ["--output_dir", "/proc/out", "can't be made or written"]),
    (["--lora-target-modules", "q_proj,w_pack"], ["--lora_target_modules", "w_pack", "o_proj"]),
    (["--rope-factor", "4"], ["--rope_factor", "--rope_scaling", "yarn"]),
    (
        ["--sp-size", "2"],
        [
            "--sp_size",
            "1 process",
            "accelerate launch --multi_gpu --num_processes 2",
            "torchrun --nproc-per-node 2 -m hf_fpdt.commands.finetune",
            "--cpu",
        ],
    ),
    (["--lora-dropout", "1.5"], ["--lora_dropout", "1.5", "allowed"]),
    (["--resume"], ["--resume", "no checkpoint", "--save_steps"]),
    (["--rope-scaling", "yarn", "--rope-factor", "nan"], ["--rope_factor", "'nan'", "allowed"]),
    (["--rope-scaling", "yarn", "--rope-factor", "inf"], ["--rope_factor", "'inf'", "allowed"]),
    *(
        ([f"{option}={number}"], [option, number.rstrip("0."), "allowed"])
        for option in ("--learning_rate", "--weight_decay", "--lora_dropout", "--eval_fraction")
        for number in ("nan", "inf", "-1")
    ),
    (["--report_to", "bogus"], ["bogus", "tensorboard"]),
    (["--optim", "lomo"], ["lomo"]),
    (["--torch_compile"], ["cannot run under this Accelerator", "torch.compile"]),
    (["--resume_from_checkpoint", "nowhere"], ["nowhere is no checkpoint", "checkpoint-N"]),
    (["--lr", "0"], ["--learning_rate", "allowed: a number above 0"]),
    (["--warmup-steps=-1"], ["--warmup_steps", "-1", "allowed"]),
    (["--seed", "-1"], ["--seed", "-1", "allowed"]),
]


def assert_one_line(stderr: str, words: list[str]) -> None:
    line = stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(("extra", "words"), MISTAKES, ids=[" ".join(extra[-2:]) for extra, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_code_2(
    extra: list[str],
    words: list[str],
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(arguments(inputs, tmp_path / "output", *extra), words, capsys)


def assert_refused(command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The command ends in one line and code 2; returns what it printed before."""
    assert main(["finetune", *command]) == 2
    printed = capsys.readouterr()
    assert_one_line(printed.err, words)
    return printed.out


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def instead_of_weights(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(content)

    return change


def in_file(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def with_another_end(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)


def with_embeddings(folder: Path, count: int) -> None:
    """As many embeddings as that, fewer than the tokenizer has tokens."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:count].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with_config(vocab_size=count)(folder)


INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["holds no weights", "save_pretrained"]),
    "cut off": (cut_off, ["model.safetensors can't be read", "SafetensorError", "download the weights again"]),
    "a git-lfs pointer": (in_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ["git-lfs"]),
    "a shard that is not there": (
        instead_of_weights("model.safetensors.index.json", INDEX),
        ["model-00001-of-00002.safetensors can't be read", "FileNotFoundError"],
    ),
    "a broken index": (instead_of_weights("model.safetensors.index.json", "{"), ["index.json is no index of weights"]),
    "a broken .bin": (instead_of_weights("pytorch_model.bin", "nothing"), ["pytorch_model.bin can't be read"]),
    "an adapter": (
        in_file("adapter_config.json", '{"base_model_name_or_path": "some/base"}'),
        ["is a PEFT adapter", "give its base model, 'some/base'", "merge_and_unload"],
    ),
    "a broken config": (in_file("config.json", "{"), ["the config of", "is not a valid JSON file"]),
    "a config of other types": (with_config(hidden_size="wide"), ["the config of", "hidden_size"]),
    "a broken tokenizer": (in_file("tokenizer.json", "{}"), ["the tokenizer of", "KeyError"]),
    "no language model": (in_file("config.json", '{"model_type": "clip"}'), ["is no causal language model"]),
    "a config that makes no model": (with_config(pad_token_id=300), ["makes no model", "Padding_idx"]),
    "an end without embedding": (with_another_end, ["the end of each document has the token '<end>' with id 300"]),
}


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_model_is_refused_before_data_is_read(
    kind: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, words = BROKEN_MODELS[kind]
    model = shutil.copytree(inputs.model, tmp_path / "model")
    breaks(model)
    command = arguments(inputs, tmp_path / "output", "--model", str(model))
    assert "reading" not in assert_refused(command, ["--model", *words], capsys)


def test_a_model_whose_weights_lack_a_layer_is_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its third layer would be trained from random numbers, with a warning among many lines."""
    model = shutil.copytree(inputs.model, tmp_path / "model")
    with_config(num_hidden_layers=3)(model)
    words = ["--model", "lack 9 parameter(s)", "model.layers.2.input_layernorm.weight", "random"]
    assert_refused(arguments(inputs, tmp_path / "output", "--model", str(model)), words, capsys)


def test_a_token_without_an_embedding_is_refused_before_weights_are_read(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(inputs.model, tmp_path / "model")
    with_embeddings(model, 280)
    words = [
        "--model",
        "document train0",
        "the tokenizer has 300 tokens, the model knows 280",
        "resize_token",
    ]
    printed = assert_refused(arguments(inputs, tmp_path / "output", "--model", str(model)), words, capsys)
    assert "loaded" not in printed


def test_a_setting_in_the_environment_that_is_none_ends_in_one_line(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPDT_HOST_BUDGET", "112")
    words = ["FPDT_HOST_BUDGET", "FPDT_HOST_BUDGET_GIB is the nearest"]
    assert_refused(arguments(inputs, tmp_path / "output"), words, capsys)


def test_a_model_fpdt_cannot_run_is_refused_before_it_loads(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen3NextConfig

    folder = tmp_path / "recurrent"
    shutil.copytree(inputs.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))  # there is nothing to load
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    Qwen3NextConfig(vocab_size=300, layer_types=["indexed_attention"], **sizes).save_pretrained(folder)
    command = arguments(inputs, tmp_path / "output", "--model", str(folder))
    assert_refused(command, ["--model", "can't train", "indexed_attention"], capsys)


def test_a_model_whose_layers_show_it_when_they_are_tried_is_refused_in_one_line(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mamba-1 looks like any recurrence until there are weights."""
    from transformers import JambaConfig, JambaForCausalLM

    folder = shutil.copytree(inputs.model, tmp_path / "mamba", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 1, "mamba_d_state": 4}
    places = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    JambaForCausalLM(JambaConfig(vocab_size=300, **sizes, **places)).save_pretrained(folder)
    command = arguments(inputs, tmp_path / "output", "--model", str(folder))
    assert_refused(command, ["--model", "can't train", "cannot be run in chunks"], capsys)
    data = command[command.index("--data") :][:2]
    assert main(["eval", "--model", str(folder), *data, "--max-length", "64", "--output", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, ["--model", "can't train", "cannot be run in chunks"])


def test_a_mistake_in_a_shell(lora: Result, inputs: Inputs) -> None:
    done = run_python(*HF_FPDT, *arguments(inputs, lora.output))
    assert done.returncode == 2
    assert_one_line(done.stderr, ["--output_dir", "not empty", "--overwrite"])


def test_lora_on_every_linear_leaves_out_what_peft_has_no_adapters_for() -> None:
    """The last linear of a Mamba: asked for by name it is a mistake, not a traceback."""
    options: Any = SimpleNamespace(full=False, lora_r=4, lora_alpha=8, lora_dropout=0.0, targets="all-linear")
    trained = {name for name, p in with_lora(recurrent("nemotron_h"), options).named_parameters() if p.requires_grad}
    assert any("in_proj" in name for name in trained) and any("o_proj" in name for name in trained)
    assert not any("out_proj" in name for name in trained)
    options.targets = ["out_proj"]
    with pytest.raises(UserMistake, match="'out_proj' is incompatible with Mamba"):
        with_lora(recurrent("nemotron_h"), options)
