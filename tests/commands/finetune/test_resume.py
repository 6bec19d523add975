"""`hf-fpdt finetune --resume` with next to no options: the run's own are taken, and its result is written once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_fpdt.commands.main import main
from tests.helpers.app_support import stories, write_jsonl, write_tiny_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YaRN run of two steps that may be lengthened, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("resume")
    model, data = write_tiny_checkpoint(folder / "model"), write_jsonl(folder / "data.jsonl", stories(6, lines=80))
    words = f"--model {model} --data {data} --eval_fraction 0.3 --max_length 1K --rope_scaling yarn --max_steps 2"
    more = f"--warmup_steps 0 --lora_r 4 --save_steps 1 --use_cpu --output_dir {folder / 'run'}"
    assert main(["finetune", *words.split(), *more.split(), "--lr_scheduler_type", "constant"]) == 0
    return folder / "run"


@pytest.fixture
def output(run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(run, tmp_path / "run")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def resume(output: Path, *words: str) -> int:
    return main(["finetune", "--resume", "--output", str(output), *words])


def without_result(output: Path) -> None:
    """As a run is left that was stopped after its last checkpoint, in the evaluation that follows."""
    settings = read(output / "settings.json")
    del settings["result_of_step"]
    (output / "settings.json").write_text(json.dumps(settings))
    for name in ("run.json", "README.md", "adapter_model.safetensors"):
        (output / name).unlink()


def test_what_is_not_given_is_as_the_run_was_started(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(output / "settings.json")["settings"]
    assert resume(output, "--steps", "3") == 0
    printed = capsys.readouterr().out
    assert "training step 3 of 3" in printed and "training step 2 of 3" not in printed
    facts = read(output / "run.json")
    assert facts["arguments"]["rope_scaling"] == "yarn" and facts["arguments"]["lora_r"] == 4
    assert read(output / "config.json")["rope_parameters"]["rope_type"] == "yarn"
    assert read(output / "settings.json")["settings"] == before
    assert len(facts["training_losses"]) == 3, "of the whole run"


def test_a_later_resume_has_the_length_of_the_last_one(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(output, "--steps", "3") == 0
    assert resume(output) == 0
    assert "is of step 3, and --max_steps is 3" in capsys.readouterr().out


def test_epochs_take_the_place_of_the_runs_steps(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(output, "--num_train_epochs", "2") == 0
    printed = capsys.readouterr().out
    assert "--max_steps was 2, is -1, --num_train_epochs was 3.0, is 2.0" in printed
    assert "the learning rate (constant) goes on as it was" in printed and "training step 3 of" in printed


def test_what_is_given_wins_and_is_refused_where_it_changes_the_result(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(output, "--steps", "4", "--rope_scaling", "none") == 2
    assert "--rope_scaling was yarn, is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cosine_warmup_with_min_lr", ["--steps", "3"]),
        ("linear", ["--num_train_epochs", "2"]),
        ("warmup_stable_decay", ["--steps", "3"]),
        ("constant_with_warmup", ["--steps", "3", "--warmup_steps", "0.1"]),
    ],
)
def test_another_length_is_refused_where_the_learning_rate_follows_it(
    schedule: str, words: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was started with this schedule."""
    settings = read(output / "settings.json")
    settings["settings"] |= {"lr_scheduler_type": schedule, "warmup_steps": 0.1 if words[2:] else 0.0}
    kwargs = {
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 1},
    }.get(schedule)
    settings["settings"]["lr_scheduler_kwargs"] = kwargs
    settings["words"] += ["--lr_scheduler_type", schedule]
    settings["words"] += ["--lr_scheduler_kwargs", json.dumps(kwargs)] if kwargs else []
    (output / "settings.json").write_text(json.dumps(settings))
    before = sorted(output.rglob("*")), (output / "run.json").read_bytes()
    assert resume(output, *words) == 2
    said = capsys.readouterr().err
    assert "--resume: --max_steps was 2, is " in said and f"the learning rate ({schedule}) falls over" in said, said
    assert f"--model {output}/merged" in said and "--lr_scheduler_type constant_with_warmup" in said
    assert (sorted(output.rglob("*")), (output / "run.json").read_bytes()) == before
    assert resume(output, *words[2:]) == 0
    assert "nothing to do" in capsys.readouterr().out, "what is not given is as before"


def test_how_often_is_saved_is_as_given_now(output: Path) -> None:
    """Trainer takes it from the checkpoint."""
    assert resume(output, "--steps", "5", "--save_steps", "2") == 0
    assert sorted(path.name for path in output.glob("checkpoint-*") if path.name > "checkpoint-2") == [
        "checkpoint-4",
        "checkpoint-5",
    ]


def test_a_checkpoint_that_is_named_says_which_run_is_gone_on_with(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--resume_from_checkpoint", str(output / "checkpoint-1")]) == 0
    printed = capsys.readouterr().out
    assert "training step 2 of 2" in printed and "training step 1 of 2" not in printed


def test_a_run_without_its_result_writes_it_and_makes_no_step(
    output: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_result(output)
    assert resume(output) == 0
    printed = capsys.readouterr().out
    assert "what was not written of its result is written now" in printed and "training step" not in printed
    facts, whole = read(output / "run.json"), read(run / "run.json")
    for name in ("steps", "held_out_loss", "training_losses"):
        assert facts[name] == pytest.approx(whole[name], abs=1e-6)
    assert (output / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    assert resume(output) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(tmp_path) == 2
    assert f"--resume: {tmp_path} holds no checkpoint" in capsys.readouterr().err
