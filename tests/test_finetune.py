"""scripts/finetune.py as a user runs it: files, facts, a result that loads and repeats its loss, and mistakes."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.app_support import ROOT, run_python, stories, write_jsonl, write_tiny_checkpoint

MAX_LENGTH_TOKENS = 1024
YARN = ("--rope-scaling", "yarn")
RESULT_FILES = (
    "README.md",
    "run.json",
    "loss_by_position.png",
    "loss_by_position.csv",
    "config.json",
    "tokenizer.json",
)


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
        *(str(ROOT / "scripts" / "finetune.py"), "--model", str(inputs.model), "--data", str(inputs.train)),
        *("--eval-data", str(inputs.held_out), "--max-length", "1K", "--chunk-tokens", "256", "--steps", "2"),
        *("--warmup", "0", "--lr", "1e-2", "--lora-r", "4", "--device", "cpu", "--output", str(output), *extra),
    ]


def finetuned(inputs: Inputs, output: Path, *extra: str) -> Result:
    done = run_python(*arguments(inputs, output, *extra))
    assert done.returncode == 0, done.stderr
    return Result(output, done.stdout)


@pytest.fixture(scope="module")
def lora(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return finetuned(inputs, tmp_path_factory.mktemp("runs") / "lora", *YARN)


@pytest.fixture(scope="module")
def full(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return finetuned(inputs, tmp_path_factory.mktemp("runs") / "full", *YARN, "--full", "--save-every", "1")


def held_out_loss(model: torch.nn.Module, inputs: Inputs) -> float:
    """The mean loss over the same windows, by the model's own loss on whole sequences."""
    from long_text import WindowDataset, document_tokens, plan_eval_windows, read_documents, tokenise
    from transformers import AutoTokenizer

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
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = run_python(*launch, *arguments(inputs, tmp_path / "shared", *YARN, "--sp-size", "2"))
    assert done.returncode == 0, done.stderr
    shared = Result(tmp_path / "shared", done.stdout)
    assert shared.facts["training_losses"] == pytest.approx(lora.facts["training_losses"], abs=1e-4)
    assert shared.facts["held_out_loss"] == pytest.approx(lora.facts["held_out_loss"], abs=1e-4)
    for name in ("loss_by_position.csv", "loss_by_position.png", "adapter_model.safetensors", "config.json"):
        assert (shared.output / name).stat().st_size > 0
    assert "| processes | 2, 2 a sequence |" in shared.card
    assert done.stdout.count("training step 1 of 2") == 1, "each line is printed once, by the first process"


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
    done = run_python(*arguments(inputs, tmp_path / "half", "--dtype", "bfloat16"))
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
    assert facts["arguments"]["max_length_tokens"] == MAX_LENGTH_TOKENS
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


def test_resume_goes_on_from_the_last_checkpoint(full: Result, inputs: Inputs) -> None:
    resumed = finetuned(
        inputs, full.output, *YARN, "--full", "--save-every", "1", "--resume", "--overwrite", "--steps", "3"
    )
    assert "training step 3 of 3" in resumed.printed and "training step 2 of 3" not in resumed.printed


MISTAKES = [
    (["--max-length", "lots"], ["--max-length", "'lots'", "1M"]),
    (["--model", "no/such-model"], ["--model", "no/such-model"]),
    (["--data", "no_such_file.jsonl"], ["no_such_file.jsonl", "existing"]),
    (["--text-column", "body"], ["--text-column", "'body'", "text"]),
    (["--lora-targets", "q_proj,w_pack"], ["--lora-targets", "w_pack", "o_proj"]),
    (["--rope-factor", "4"], ["--rope-factor", "--rope-scaling", "yarn"]),
    (["--sp-size", "2"], ["--sp-size", "1 process", "accelerate launch --num_processes"]),
    (["--lora-dropout", "1.5"], ["--lora-dropout", "1.5", "allowed"]),
    (["--resume"], ["--resume", "no checkpoint", "--save-every"]),
]


def assert_one_line(stderr: str, words: list[str]) -> None:
    line = stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(("extra", "words"), MISTAKES, ids=[extra[0] for extra, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_code_2(
    extra: list[str],
    words: list[str],
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import finetune

    monkeypatch.setattr("sys.argv", arguments(inputs, tmp_path / "output", *extra))
    with pytest.raises(SystemExit) as left:
        finetune.run_main(finetune.main)
    assert left.value.code == 2
    assert_one_line(capsys.readouterr().err, words)


def test_a_setting_in_the_environment_that_is_none_ends_in_one_line(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPDT_HOST_BUDGET", "112")
    test_a_mistake_ends_in_one_line_and_code_2(
        [], ["FPDT_HOST_BUDGET", "FPDT_HOST_BUDGET_GIB is the nearest"], inputs, tmp_path, monkeypatch, capsys
    )


def test_a_model_fpdt_cannot_run_is_refused_before_it_loads(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune
    from transformers import MistralConfig

    folder = tmp_path / "sliding"
    shutil.copytree(inputs.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))  # there is nothing to load
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=8, **sizes).save_pretrained(folder)
    monkeypatch.setattr("sys.argv", arguments(inputs, tmp_path / "output", "--model", str(folder)))
    with pytest.raises(SystemExit) as left:
        finetune.run_main(finetune.main)
    assert left.value.code == 2
    assert_one_line(capsys.readouterr().err, ["--model", "can't train", "sliding"])


def test_a_mistake_in_a_shell(lora: Result, inputs: Inputs) -> None:
    done = run_python(*arguments(inputs, lora.output))
    assert done.returncode == 2
    assert_one_line(done.stderr, ["--output", "not empty", "--overwrite"])
