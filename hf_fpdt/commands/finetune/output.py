"""The folder of a run: made before hours of work, never of two runs, and gone on in with the same settings alone."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import get_last_checkpoint

from ..options import UserMistake, one_line
from .merge import MERGED, merged_folder
from .options import Options
from .quantise import NONE

SETTINGS = "settings.json"
# What a result follows from, but for how long is trained; where and how fast it is computed may change.
OWN_SETTINGS = (
    "model",
    "dtype",
    "data",
    "text_column",
    "broken_lines",
    "eval_data",
    "eval_fraction",
    "max_length",
    "long_documents",
    "full",
) + ("rope_scaling", "rope_factor", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
TRAINER_SETTINGS = (
    ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args")
    + ("optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "weight_decay")
    + ("neftune_noise_alpha", "seed", "data_seed", "bf16", "fp16", "train_sampling_strategy", "dataloader_drop_last")
)
LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
DATA_SETTINGS = ("documents", "tokens", "windows")
# May change where the learning rate does not follow from them.
LENGTHS = ("max_steps", "num_train_epochs")
# Options of one start of a run, not of the run; the first two say which run is gone on with.
OF_ONE_START = ("--resume", "--resume_from_checkpoint", "--output_dir", "--output", "--overwrite")
LENGTH_WORDS = ("--max_steps", "--steps", "--num_train_epochs")
NO_CHECKPOINT = "holds no checkpoint; start without --resume (see --save_steps)"
WINDOWS_A_STEP = "per_device_train_batch_size * gradient_accumulation_steps * processes / sp_size"


def settings_of(options: Options) -> dict[str, Any]:
    """By option, everything that the result follows from."""
    trainer = options.trainer.to_dict()
    own = {name: value for name, value in options.own().items() if name in OWN_SETTINGS}
    if options.quantize != NONE:  # runs of before there was such an option go on
        own["quantize"] = options.quantize
    if options.full:  # what is said of adapters does not matter then
        own = {name: value for name, value in own.items() if name not in LORA_SETTINGS}
    chosen = {name: trainer[name] for name in TRAINER_SETTINGS if name in trainer}
    return json.loads(json.dumps({**own, **chosen, WINDOWS_A_STEP: windows_a_step(options)}, default=str))


def windows_a_step(options: Options) -> int:
    """Over all processes."""
    windows = options.trainer.per_device_train_batch_size * options.trainer.gradient_accumulation_steps
    return windows * int(os.environ.get("WORLD_SIZE", "1")) // options.plugin.sp_size


def words_of_the_run(words: Sequence[str]) -> list[str]:
    """The options that the run which `words` go on with was started with, to be read before them; [] for a new run."""
    found, _ = _without(OF_ONE_START, words)
    named = found["resume_from_checkpoint"]
    if named is None and found["resume"] in (None, "no", "false", "False", "0"):
        return []
    folder = Path(named).parent if named else Path(found["output_dir"] or found["output"] or ".")
    path = folder / SETTINGS
    if not path.is_file():
        if named or any(word.startswith("--model") for word in words):
            return []  # whether there is a checkpoint is looked at later
        raise UserMistake(f"--resume: {folder} {NO_CHECKPOINT}")
    _, kept = _without(OF_ONE_START, _read(path).get("words", []))
    lengths, _ = _without(LENGTH_WORDS, words)
    if any(value is not None for value in lengths.values()):  # steps and epochs are two ways to say one thing
        _, kept = _without(LENGTH_WORDS, kept)
    return [*kept, f"--output_dir={folder}"] if kept else []


def _without(names: Sequence[str], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What is given of these options, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name, nargs="?", const="yes")
    found, others = parser.parse_known_args(list(words))
    return vars(found), others


def check_output(options: Options) -> None:
    """Make the folder, so that hours of work do not end at it; never mix two runs in one folder by accident."""
    if os.environ.get("RANK", "0") != "0":
        return  # the first process writes, and the others might find what it has written
    output = Path(options.trainer.output_dir)
    make_folder(output)
    if options.resume or _goes_on_in(output, options):
        return
    if any(output.iterdir()) and not options.overwrite:
        raise UserMistake(
            f"--output_dir: the folder {output} is not empty; give a new one, or add --overwrite, or --resume to go on"
        )
    if old := get_last_checkpoint(str(output)):
        raise UserMistake(
            f"--overwrite: {old} is of another run, and --resume could not tell it from this one's; remove the "
            "checkpoints, or give a new folder, or --resume to go on"
        )


def _goes_on_in(output: Path, options: Options) -> bool:
    named = options.trainer.resume_from_checkpoint
    return bool(named) and Path(named).resolve().parent == output.resolve()


def make_folder(folder: Path) -> None:
    """Make the folder and write into it: nothing else shows that it can be done."""
    try:
        if folder.is_file():
            raise UserMistake(f"--output_dir: {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserMistake(
            f"--output_dir: the folder {folder} can't be made or written: {one_line(error)}; give one that can be"
        ) from error


def checkpoint_of(options: Options) -> Path | None:
    """The checkpoint to go on from, of a run with the same settings; None for a run from the start."""
    output = Path(options.trainer.output_dir)
    named = options.trainer.resume_from_checkpoint
    if not options.resume and not named:
        return None
    last = named or (get_last_checkpoint(str(output)) if output.is_dir() else None)
    if last is None:
        raise UserMistake(f"--resume: {output} {NO_CHECKPOINT}")
    checkpoint = Path(last)
    if not (checkpoint / "trainer_state.json").is_file():
        raise UserMistake(f"--resume_from_checkpoint: {checkpoint} is no checkpoint; give a run's checkpoint-N")
    kept = _read(checkpoint.parent / SETTINGS).get("settings", {})
    now = settings_of(options)
    names = sorted(name for name in {*kept, *now} if kept.get(name) != now.get(name))
    if names:
        changed = ", ".join(f"--{name} was {kept.get(name)}, is {now.get(name)}" for name in names)
        raise UserMistake(
            f"--resume: the run in {checkpoint.parent} was started with other settings: {changed}; give the same, or "
            "start a new run in another folder"
        )
    return checkpoint


def check_data(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with other documents under the same names."""
    kept = _read(checkpoint.parent / SETTINGS).get("data", {})
    changed = [
        f"{kept.get(name)} {name}, now {facts[name]}" for name in DATA_SETTINGS if kept.get(name) != facts[name]
    ]
    if changed:
        raise UserMistake(
            f"--resume: the run in {checkpoint.parent} was started with other data: {'; '.join(changed)}; give the "
            "same, or start a new run in another folder"
        )


def new_length(checkpoint: Path, options: Options) -> str | None:
    """What to say of a run that is to be longer or shorter than it was started.

    Raises:
        UserMistake: its learning rate was to follow a schedule over the old length.
    """
    kept = _read(checkpoint.parent / SETTINGS).get("length", {})
    now = _lengths(options)
    changed = [f"--{name} was {kept.get(name)}, is {now[name]}" for name in LENGTHS if kept.get(name) != now[name]]
    if not changed:
        return None
    what, schedule = ", ".join(changed), str(options.trainer.lr_scheduler_type.value)
    if not _follows_length(options):
        return f"{what}: the learning rate ({schedule}) goes on as it was"
    result = checkpoint.parent if options.full else f"{checkpoint.parent / MERGED} (written by --merge)"
    raise UserMistake(
        f"--resume: {what}, and the learning rate ({schedule}) falls over the whole length, so the steps that were "
        "made belong to the old one. Leave it out, and the run ends as it was started; to train further, start one in "
        f"a new folder with --model {result}. A run that is to be lengthened is started with --lr_scheduler_type "
        "constant_with_warmup"
    )


def _follows_length(options: Options) -> bool:
    """Whether the learning rate of a step depends on how many there are."""
    schedule = TYPE_TO_SCHEDULER_FUNCTION[options.trainer.lr_scheduler_type]
    share = 0 < options.trainer.warmup_steps < 1  # of all steps
    return share or "num_training_steps" in inspect.signature(schedule).parameters


def _lengths(options: Options) -> dict[str, float]:
    return {name: getattr(options.trainer, name) for name in LENGTHS}


def write_settings(options: Options, facts: Mapping[str, Any]) -> None:
    """At each start, so that a run that ends early can be gone on with."""
    data = {name: facts[name] for name in DATA_SETTINGS}
    _, words = _without(OF_ONE_START, options.words)
    content = {"settings": settings_of(options), "length": _lengths(options), "data": data, "words": words}
    _write(Path(options.trainer.output_dir) / SETTINGS, content)


def result_is_written(options: Options, step: int) -> None:
    """Note that the folder holds the weights and the card of this step."""
    path = Path(options.trainer.output_dir) / SETTINGS
    _write(path, {**_read(path), "result_of_step": step})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """At once: another process, or the next start, may read it at any moment."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def finished(checkpoint: Path, options: Options) -> str | None:
    """Why nothing is left to do after this checkpoint; None where there is, if only to write the result."""
    state = _read(checkpoint / "trainer_state.json")
    step, epoch = int(state.get("global_step", 0)), float(state.get("epoch") or 0)
    steps, epochs = options.trainer.max_steps, options.trainer.num_train_epochs
    kept = _read(checkpoint.parent / SETTINGS)
    merged = merged_folder(options)
    not_merged = merged is not None and not merged.is_dir()
    lacks_result = not_merged or ("words" in kept and kept.get("result_of_step") != step)
    if lacks_result and (step == steps if steps > 0 else epoch == epochs):
        return None
    if steps > 0 and step >= steps:
        return f"nothing to do: {checkpoint} is of step {step}, and --max_steps is {steps}"
    if steps <= 0 and epoch >= epochs:
        return f"nothing to do: {checkpoint} is of epoch {epoch:g}, and --num_train_epochs is {epochs:g}"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserMistake(
            f"--resume: {path} can't be read: {one_line(error)}; give a checkpoint that this command has written"
        ) from error
    if not isinstance(content, dict):
        raise UserMistake(f"--resume: {path} holds no settings; give a checkpoint that this command has written")
    return content
