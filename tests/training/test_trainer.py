"""The stock transformers.Trainer over a model with FPDT: the same losses, evaluations, columns and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_fpdt import FPDTPlugin, apply_fpdt
from tests.helpers.models import tiny
from tests.helpers.support import assert_rejects

TOLERANCE = 1e-5
STEPS = 20
ACCUMULATION = 2
PLUGIN = FPDTPlugin(chunk_tokens=16, loss_chunk_tokens=24)


def text_rows(count: int, start: int = 0) -> Dataset:
    """Ragged rows of real text, a byte a token, with a column that no model takes."""
    text = Path(json.__file__).read_bytes()[start:]
    rows, position = [], 0
    for index in range(count):
        length = 40 + (index * 7) % 24
        ids = [3 + byte for byte in text[position : position + length]]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "where": f"json {position}"})
        position += length
    return Dataset.from_list(rows)


class PadRight:
    """Pads a batch on the right: ids 0, labels -100, and a 2-D mask."""

    def __init__(self) -> None:
        self.columns: set[str] = set()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.columns |= set().union(*rows)
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        ids = padded("input_ids", 0)
        return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


class RecordLoss(Trainer):
    """Trainer that keeps each micro-step's loss; the log rounds."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def trainer(folder: Path, *, fpdt: bool, lora: bool = False, **arguments: Any) -> Any:
    model: nn.Module = tiny(dtype=torch.float32, vocab_size=260)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if fpdt:
        apply_fpdt(model, PLUGIN)
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": ACCUMULATION,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **arguments,
    }
    return RecordLoss(
        model=model,
        args=TrainingArguments(**chosen),
        train_dataset=text_rows(48),
        eval_dataset=text_rows(7, start=4000),
        data_collator=PadRight(),
    )


def losses_of(run: Any) -> list[float]:
    run.train()
    return run.losses


def assert_same_losses(ours: list[float], truth: list[float]) -> None:
    assert len(ours) == len(truth)
    for step, (mine, other) in enumerate(zip(ours, truth, strict=True)):
        assert abs(mine - other) <= TOLERANCE * abs(other), f"micro-step {step}: {mine}, not {other}"


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": True},
    "full, checkpointing": {"gradient_checkpointing": True},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "tokens not averaged": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("case", CASES)
def test_training_and_evaluation_equal_sdpa(case: str, tmp_path: Path) -> None:
    ours, theirs = (trainer(tmp_path, fpdt=fpdt, **CASES[case]) for fpdt in (True, False))
    truth = losses_of(theirs)
    assert_same_losses(losses_of(ours), truth)
    assert sum(truth[-8:]) < 0.95 * sum(truth[:8]), "nothing was learnt, so nothing was compared"
    broken = {"one step behind": [truth[0], *truth[:-1]], "not trained": [truth[0]] * len(truth)}
    assert_rejects(lambda losses: assert_same_losses(losses, truth), broken)
    ours_eval, theirs_eval = (run.evaluate()["eval_loss"] for run in (ours, theirs))
    assert abs(ours_eval - theirs_eval) <= TOLERANCE * theirs_eval


def test_columns_that_the_model_does_not_take_are_removed(tmp_path: Path) -> None:
    """Trainer reads the names from the signature of forward."""
    ours, theirs = (trainer(tmp_path, fpdt=fpdt, max_steps=1) for fpdt in (True, False))
    for run in (ours, theirs):
        run.train()
    assert ours.data_collator.columns == theirs.data_collator.columns == {"input_ids", "labels"}
    assert ours.model_accepts_loss_kwargs == theirs.model_accepts_loss_kwargs
    assert ours.can_return_loss == theirs.can_return_loss


def test_a_resumed_run_goes_on_as_one_that_never_stopped(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        return trainer(tmp_path, fpdt=True, save_strategy="steps", save_steps=10, **arguments)

    whole = losses_of(run())
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    rest = whole[10 * ACCUMULATION :]
    assert_same_losses(resumed.losses, rest)
    assert_rejects(lambda losses: assert_same_losses(losses, rest), {"started again": whole[: len(rest)]})


def test_a_checkpoint_is_one_of_the_stock_model(tmp_path: Path) -> None:
    ours = trainer(tmp_path, fpdt=True, max_steps=2, save_strategy="steps", save_steps=2)
    ours.train()
    stock = trainer(tmp_path, fpdt=False, max_steps=4, save_strategy="no")
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    longer = losses_of(trainer(tmp_path / "other", fpdt=False, max_steps=4))
    assert_same_losses(stock.losses, longer[2 * ACCUMULATION :])


def test_label_smoothing_and_own_losses_train_from_the_logits(tmp_path: Path) -> None:
    ours, theirs = (trainer(tmp_path, fpdt=fpdt, max_steps=4, label_smoothing_factor=0.1) for fpdt in (True, False))
    truth = losses_of(theirs)
    assert_same_losses(losses_of(ours), truth)
    plain = losses_of(trainer(tmp_path, fpdt=False, max_steps=4))
    assert_rejects(lambda losses: assert_same_losses(losses, truth), {"not smoothed": plain})


def test_bf16_training_follows_sdpa_in_bf16(tmp_path: Path) -> None:
    """Both stray from fp32 by rounding, the one as little as the other."""
    exact = losses_of(trainer(tmp_path, fpdt=False))
    errors = []
    for fpdt in (True, False):
        losses = losses_of(trainer(tmp_path, fpdt=fpdt, bf16=True))
        errors.append(sum(abs(a - b) for a, b in zip(losses, exact, strict=True)))
    ours, naive = errors
    assert 0 < ours <= 2 * naive
