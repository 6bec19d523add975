"""Options of `hf-fpdt finetune`: transformers' own names, a file, precedence, what is refused, and what help shows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import hf_fpdt
from hf_fpdt import FPDTPlugin
from hf_fpdt.commands.conditions import version_of
from hf_fpdt.commands.eval.options import EvalOptions
from hf_fpdt.commands.finetune.command import add_finetune
from hf_fpdt.commands.finetune.options import Options, dtype_of, read_options
from hf_fpdt.commands.finetune.trainer_options import intervals_line
from hf_fpdt.commands.main import main
from hf_fpdt.commands.options import UserMistake
from tests.helpers.app_support import ROOT, run_python, stories, write_tiny_checkpoint
from tests.helpers.processes import LIMIT_S

NEEDED = ("--model", "m", "--data", "d", "--output_dir", "o", "--use_cpu")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_finetune(parser.add_subparsers())
    return parser.parse_args(["finetune", *words])


def options(*words: str) -> Options:
    return read_options(parsed(*NEEDED, *words))


def refusal(*words: str) -> str:
    with pytest.raises(UserMistake) as raised:
        options(*words)
    return str(raised.value)


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Fields that hold an object, which transformers' own parser reads from no text.
OBJECTS = {
    "liger_kernel_config": '{"rope": true}',
    "parallelism_config": '{"cp_size": 1}',
    "debug": "underflow_overflow",
}


def test_every_field_of_training_arguments_is_an_option() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    add_finetune(commands)
    parser = commands.choices["finetune"]
    by_name = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert len(names) > 90
    for name in names:
        text = OBJECTS.get(name) or str(list(by_name[name].choices or ["1"])[-1])
        given = [parser.parse_args([*NEEDED, f"--{word}", text]) for word in (name, name.replace("_", "-"))]
        values = [getattr(found, name) for found in given]
        assert values[0] == values[1] and values[0] not in (None, False), name


def test_the_values_reach_training_arguments() -> None:
    trainer = options(
        *("--optim", "adafactor", "--learning-rate", "3e-4", "--max-steps", "7", "--lr_scheduler_type", "linear"),
        *("--adam_beta2", "0.9", "--per-device-train-batch-size", "2", "--bf16", "true", "--save_strategy", "epoch"),
        *("--label_names", "a", "b", "--logging_steps", "5", "--no_dataloader_pin_memory", "--seed", "3"),
    ).trainer
    assert (trainer.optim.value, trainer.learning_rate, trainer.max_steps) == ("adafactor", 3e-4, 7)
    assert (trainer.lr_scheduler_type.value, trainer.lr_scheduler_kwargs, trainer.adam_beta2) == ("linear", None, 0.9)
    assert (trainer.per_device_train_batch_size, trainer.bf16, trainer.save_strategy.value) == (2, True, "epoch")
    assert (trainer.label_names, trainer.logging_steps, trainer.seed) == (["a", "b"], 5, 3)


def test_our_defaults_and_what_follows_from_them() -> None:
    found = options()
    trainer = found.trainer
    assert (trainer.lr_scheduler_type.value, trainer.lr_scheduler_kwargs) == (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1},
    )
    assert options("--lr_scheduler_type", "cosine_with_min_lr").trainer.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (trainer.max_steps, trainer.learning_rate, trainer.adam_beta2, trainer.bf16) == (100, 2e-4, 0.95, False)
    assert (trainer.report_to, trainer.remove_unused_columns) == ([], False)
    assert (trainer.logging_steps, trainer.ddp_find_unused_parameters, trainer.use_cpu) == (1, False, True)
    assert trainer.per_device_train_batch_size == trainer.per_device_eval_batch_size == 1
    assert (found.targets, found.factor, found.max_length) == ("all-linear", None, 64 * 1024)
    epochs = options("--num_train_epochs", "2").trainer
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 2.0)
    half = options("--dtype", "bfloat16")
    assert half.trainer.bf16 and not options("--dtype", "bfloat16", "--bf16", "no").trainer.bf16
    assert options("--lr", "1e-3", "--steps", "3", "--output", "p").trainer.output_dir == "p"


def test_weights_are_measured_in_the_dtype_that_they_are_trained_in() -> None:
    measured = EvalOptions(model="m", data=["d"], output_dir=Path("o"))
    assert measured.dtype == options().dtype == "auto"
    assert [dtype_of("auto", on_gpu=on_gpu) for on_gpu in (True, False)] == [torch.bfloat16, torch.float32]
    assert dtype_of("float32", on_gpu=True) == options().torch_dtype == torch.float32


def intervals(*words: str) -> tuple[Any, ...]:
    """When a checkpoint is kept, how many are, and when is evaluated."""
    found = options(*words).trainer
    save, evaluate = found.save_strategy.value, found.eval_strategy.value
    saves = found.save_steps if save == "steps" else save
    return saves, found.save_total_limit, found.eval_steps if evaluate == "steps" else evaluate


def test_a_long_run_keeps_two_checkpoints_and_evaluates_on_data_given_for_it() -> None:
    assert intervals() == (5, 2, "no"), "of 100 steps"
    assert intervals("--eval_data", "h") == (5, 2, 30)
    assert intervals("--eval_data", "h", "--max_steps", "1000") == (50, 2, 300)
    assert intervals("--eval_data", "h", "--max_steps", "2") == (1, 2, 1)
    assert intervals("--eval_data", "h", "--num_train_epochs", "2") == (0.05, 2, 0.3)


def test_what_is_given_of_checkpoints_and_evaluations_wins() -> None:
    assert intervals("--save_steps", "7", "--save_total_limit", "4", "--eval_data", "h") == (7, 4, 30)
    assert intervals("--save_strategy", "no", "--eval_data", "h", "--eval_strategy", "no") == ("no", 2, "no")
    assert intervals("--eval_strategy", "epoch", "--save_strategy", "epoch") == ("epoch", 2, "epoch")
    assert intervals("--eval_steps", "9") == (5, 2, 9), "without a strategy they are for nothing"
    assert intervals("--eval_strategy", "steps") == (5, 2, 30)
    best = ("--load_best_model_at_end", "--eval_strategy")
    assert intervals(*best, "steps", "--eval_steps", "9") == (9, 2, 9), "where it is measured it is kept"
    assert intervals(*best, "epoch") == ("epoch", 2, "epoch")
    assert options("--report_to", "tensorboard").trainer.report_to == ["tensorboard"]


def test_checkpoints_and_evaluations_are_said() -> None:
    line = intervals_line(options("--eval_data", "h").trainer)
    assert "every 5 steps, the last 2 are kept" in line and "evaluations in training: every 30 steps" in line
    line = intervals_line(options("--save_strategy", "no", "--num_train_epochs", "1", "--eval_steps", "0.5").trainer)
    assert line == "checkpoints in training: none; evaluations in training: every 50% of the steps"


def test_dashes_and_underscores_are_the_same_option() -> None:
    words = ("--max-length=32K", "--sp-size", "1", "--lora-target-modules", "q_proj", "v_proj", "--eval-docs", "3")
    one, other = options(*words), options(*(w.replace("-", "_").replace("__", "--", 1) for w in words))
    assert one.own() == other.own() and one.max_length == 32 * 1024 and one.targets == ["q_proj", "v_proj"]


def test_the_plugins_fields_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDT_CHECKPOINTS", "input")
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "8K")
    plugin = options("--chunk_tokens", "32K", "--kernel", "math", "--host_budget_gib", "1.5", "--fused", "no").plugin
    assert (plugin.chunk_tokens, plugin.kernel, plugin.host_budget_gib, plugin.fused) == (32768, "math", 1.5, False)
    assert plugin.checkpoints == "input", "what is not given comes from the environment"
    assert options("--progress").plugin.progress
    assert all(f"--{field.name} " in help_text() or f"--{field.name}\n" in help_text() for field in fields_of_plugin())


def fields_of_plugin() -> tuple[Any, ...]:
    return dataclasses.fields(FPDTPlugin)


def help_text(*words: str) -> str:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add_finetune(commands)
    return commands.choices["finetune"].format_help()


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path,
        "model: from-file\ndata: [a.txt, b.txt]\noutput_dir: out\nmax-length: 16K\nlearning_rate: 1e-3\nmax_steps: 9\n"
        "full: true\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\nsp_size: 1\nuse_cpu: true\nlora_target_modules: null\n",
    )
    found = read_options(parsed("--config", path, "--max_steps", "4", "--model", "from-line"))
    assert (found.model, found.data, found.trainer.output_dir) == ("from-line", ["a.txt", "b.txt"], "out")
    assert (found.max_length, found.trainer.learning_rate, found.trainer.max_steps) == (16 * 1024, 1e-3, 4)
    assert found.full and found.trainer.lr_scheduler_kwargs == {"min_lr_rate": 0.5}
    assert found.lora_r == 16 and found.targets == "all-linear", "what neither gives is the default"
    assert "--config" not in found.words and "--max_length=16K" in found.words, "the card's command needs no file"


def test_the_example_of_a_file_is_read() -> None:
    found = read_options(parsed("--config", str(ROOT / "examples" / "finetune.yaml"), *NEEDED))
    assert (found.max_length, found.trainer.eval_steps, found.trainer.save_strategy.value) == (64 * 1024, 25, "steps")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_lenght: 16K", ["has an unknown key 'max_lenght'; did you mean --max_length?"]),
        ("learning_rat: 1", ["unknown key 'learning_rat'; did you mean --learning_rate?"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("- model", ["holds no options", "max_length: 64K"]),
        ("a: [", ["can't be read"]),
        ("max_steps: many", ["--max_steps: invalid int value: 'many'"]),
        ("max_steps: [1, 2]", ["--max_steps"]),
        ("lr_scheduler_type: steep", ["--lr_scheduler_type: invalid choice: 'steep'"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    said = refusal("--config", yaml_file(tmp_path, text))
    assert "\n" not in said and all(word in said for word in words), said
    assert "no_such.yaml can't be read" in refusal("--config", "no_such.yaml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--max-lenght", "1K"], ["unknown option --max_lenght; did you mean --max_length?"]),
        (["--zzz"], ["unknown option --zzz; it is no option"]),
        (["--max_len", "1K"], ["unknown option --max_len"]),  # no abbreviations: new options would change them
        (["--optim", "bogus"], ["bogus", "adamw_torch"]),
        (["--kernel", "bogus"], ["kernel='bogus'", "'math'"]),
        (["--checkpoints", "bogus"], ["checkpoints='bogus'"]),
        (["--sp_size", "0"], ["sp_size=0"]),
        (["--host_budget_gib", "much"], ["--host_budget_gib", "'much'"]),
        (["--label_smoothing_factor", "0.1"], ["label_smoothing_factor needs whole logits", "set it to 0"]),
        (["--use_liger_kernel"], ["Liger's fused loss would replace FPDT's"]),
        (["--no_average_tokens_across_devices"], ["average_tokens_across_devices"]),
        (["--push_to_hub"], ["--push_to_hub", "hf upload"]),
        (["--do_predict"], ["--do_predict"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size", "from 1"]),
        (["--max_steps", "0"], ["--max_steps", "from 1"]),
        (["--num_train_epochs", "0"], ["--num_train_epochs", "above 0"]),
        (["--max_steps", "-1"], ["--num_train_epochs", "or give --max_steps"]),
        (["--eval_strategy", "steps", "--eval_steps", "0", "--logging_steps", "0"], ["--eval_steps"]),
        (["--load_best_model_at_end"], ["load_best_model_at_end"]),
        (["--max_grad_norm", "nan"], ["--max_grad_norm"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_what_cannot_be_is_refused_in_one_line(given: list[str], words: list[str]) -> None:
    said = refusal(*given)
    assert "\n" not in said and all(word in said for word in words), said


def test_what_must_be_given_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--model", "m"]) == 2
    error = capsys.readouterr().err
    assert "required: --data, --output_dir; see hf-fpdt finetune --help" in error and error.count("\n") == 1


def test_help_shows_ours_and_names_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 100 and max(map(len, short.splitlines())) <= 119
    assert "--max_length TOKENS" in short and "--max-length" not in short and "(default: auto)" in short
    assert "Every field of transformers.TrainingArguments" in short and "neftune" not in short
    with pytest.raises(SystemExit):
        main(["finetune", "--help-all"])
    everything = capsys.readouterr().out
    assert "--neftune_noise_alpha" in everything and "--max_length TOKENS" in everything


PRINTED = re.compile(r"(?:^\$ |^|`)(hf-fpdt (?:check|[a-z]+ -)[^`#\n]*)", re.MULTILINE)
# Fewer steps than the default, and away from a GPU that might be there.
SHORTER = {"finetune": ["--max_steps", "2", "--use_cpu"], "eval": ["--use_cpu"]}
PROGRAM = """
import json, sys
from hf_fpdt.commands.main import main
import hf_fpdt
def run(*words):
    try:
        code = main(list(words))
    except SystemExit as ended:
        code = ended.code
    assert not code, (words, code)
for name in ("check", "plan", "trace", "bench", "finetune", "eval"):
    run(name, "--help")
run("--help")
run("--version")
run("plan", "NAME", "--host-mem", "16", "--seq-len", "4K")
assert "matplotlib" not in sys.modules
for words in json.loads(sys.argv[1]):
    print("command", words[0], file=sys.stderr)
    run(*words)
print("command", file=sys.stderr)
run("check", "OUT")
run(*"finetune --resume --output OUT --use_cpu".split())
print(hf_fpdt.__file__, file=sys.stderr)
"""


def wheel_in(folder: Path) -> Path:
    """The package as a wheel has it, unpacked beside the folder of its source."""
    source, site = folder / "source", folder / "site"
    shutil.copytree(ROOT / "hf_fpdt", source / "hf_fpdt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "accelerate", source / "examples" / "accelerate")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=LIMIT_S)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    return site


def test_a_wheel_runs_the_commands_that_the_readme_prints(tmp_path: Path) -> None:
    """Built and used away from the checkout, on a toy model and a folder of text; --help and plan draw nothing."""
    site = wheel_in(tmp_path)
    assert (site / "hf_fpdt" / "commands" / "finetune" / "template.md").is_file()
    (shared,) = site.glob("*.data/data/share/hf_fpdt/accelerate")
    assert {path.name for path in shared.iterdir()} == {p.name for p in (ROOT / "examples" / "accelerate").iterdir()}
    (metadata,) = site.glob("*.dist-info/METADATA")
    told = metadata.read_text(encoding="utf-8")
    assert f"\nVersion: {hf_fpdt.__version__}\n" in told and "\nProject-URL: Paper, https://arxiv.org/" in told
    # Named alone a pre-release is not taken where a withdrawn final release is listed.
    for needed in (r"flash-attn-4>=4\.0\.0b\d+", "liger-kernel", "matplotlib"):
        assert re.search(rf"^Requires-Dist: {needed}; extra == .gpu.$", told, re.MULTILINE), needed
    write_tiny_checkpoint(tmp_path / "NAME")
    (tmp_path / "FOLDER").mkdir()
    for number, text in enumerate(stories(6)):
        (tmp_path / "FOLDER" / f"{number}.txt").write_text(text, encoding="utf-8")
    printed = [shlex.split(line)[1:] for line in PRINTED.findall((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert sorted({words[0] for words in printed}) == ["check", "eval", "finetune", "plan"]
    commands = [words + SHORTER.get(words[0], []) for words in printed]
    # As an installed package, so that the checkout's is found by none of the commands.
    done = run_python("-c", PROGRAM, json.dumps(commands), package=site, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"hf-fpdt {hf_fpdt.__version__} (torch {version_of('torch')}, transformers " in done.stdout
    said = done.stderr.partition("command finetune")[2].partition("command")[0]
    # Of one document, which is evaluated, and of several, which are trained on.
    kernels = [line for line in said.splitlines() if "attention kernel 'cpu'" in line]
    assert len(kernels) == 2 and "several documents a row" in kernels[1]
    assert said.count("hf_fpdt: LlamaForCausalLM, 2 layers") == 1
    assert "; keeps 2 inputs" in said, "finetune shows what it does"
    assert "training: 2 steps, 1 of 1 windows each: 2 times through them" in done.stdout
    rates = [float(rate) for rate in re.findall(r"training step \d of 2: loss [\d.]+, lr ([\d.e-]+)", done.stdout)]
    assert len(rates) == 2 and 0 < rates[0] < rates[1], "the first step of the warmup trains too"
    assert "adapter   OUT: LORA of rank 16, on NAME" in done.stdout and "nothing to do: " in done.stdout
    assert done.stderr.split()[-1] == str(site / "hf_fpdt" / "__init__.py")
    assert (tmp_path / "OUT" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "OUT" / "README.md").read_text(encoding="utf-8")  # its template is package data
    (longest,) = re.findall(r"windows of 512K, .* the longest document in them has ([\d,]+) tokens", done.stdout)
    assert f"# NAME at {longest} tokens" in card and f"on sequences of {longest} tokens" in card
    assert (tmp_path / "CURVES" / "loss_by_position.csv").is_file()


def test_settings_can_be_written_down() -> None:
    from hf_fpdt.commands.finetune.output import settings_of

    assert json.loads(json.dumps(settings_of(options()))) == settings_of(options())
