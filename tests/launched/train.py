"""Small Trainer runs, one after the other, that `test_launch.py` starts with `accelerate launch`.

accelerate launch ... tests/launched/train.py OUTPUT '{"name": {"sp_size": 2, "steps": 3, ...}, ...}'

Each run leaves OUTPUT/name.json (losses, evaluations, …) and OUTPUT/name.pt (weights). See `Run` for what can be set.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

from hf_fpdt import FPDTPlugin, FPDTTrainer

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Run:
    """One training run and the evaluations after it."""

    sp_size: int = 1
    steps: int = 3
    epochs: int = 0  # instead of steps
    batch_size: int = 1
    grad_accum: int = 1
    save_steps: int = 0
    resume: str | None = None  # "run/checkpoint-2"
    workers: int = 0
    random_rows: bool = False
    lora: bool = False
    stream: bool = False
    sampling: str = "random"
    fail_on_rank: int = -1
    fail_at_step: int = 2


def rows(count: int, first: int) -> list[Row]:
    """Windows of the standard library, a token a byte, of lengths that ranks and chunks do not divide."""
    text = Path(json.__file__).read_bytes()
    made = []
    for index in range(first, first + count):
        ids = list(text[index * 50 : index * 50 + 31 + index * 7 % 17])
        made.append({"input_ids": ids, "labels": ids})
    return made


class Rows(Dataset):
    """Some of `rows`; `random`: their labels are masked at random, as an augmentation in a worker would."""

    def __init__(self, count: int, first: int, *, random: bool = False) -> None:
        self.rows, self.random = rows(count, first), random

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        if not self.random:
            return row
        ignored = (torch.rand(len(row["labels"])) < 0.3).tolist()
        return {**row, "labels": [-100 if i else label for i, label in zip(ignored, row["labels"], strict=True)]}


class Stream(IterableDataset):
    """`rows` without a length."""

    def __init__(self, count: int, first: int) -> None:
        self.rows = rows(count, first)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


class Fail(TrainerCallback):
    """Raises on one rank, in the middle of training."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.run.fail_on_rank and state.global_step == self.run.fail_at_step:
            raise RuntimeError(f"this rank was told to fail at {time.time()}")


def tiny_model(lora: bool) -> Any:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).double()
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).double()


def arguments(run: Run, output: Path, name: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output / name),
        max_steps=-1 if run.epochs else run.steps,
        num_train_epochs=run.epochs or 3,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.grad_accum,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        dataloader_num_workers=run.workers,
        train_sampling_strategy=run.sampling,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


def collate(features: list[Row]) -> dict[str, torch.Tensor]:
    """Padded on the right, with a mask."""
    length = max(len(feature["input_ids"]) for feature in features)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([feature[name] + [value] * (length - len(feature[name])) for feature in features])

    mask = torch.tensor([[int(i < len(feature["input_ids"])) for i in range(length)] for feature in features])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


class Counted(FPDTTrainer):
    """Counts the tokens that are trained on: all of a rank's part of a sequence, else those that are no padding."""

    computed = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.computed += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


def execute(run: Run, output: Path, name: str) -> FPDTTrainer:
    """Train, evaluate, and write what came of it."""
    trainer = Counted(
        model=tiny_model(run.lora),
        args=arguments(run, output, name),
        train_dataset=Stream(24, 0) if run.stream else Rows(24, 0, random=run.random_rows),
        eval_dataset=Rows(13, 30),
        data_collator=collate,
        callbacks=[Fail(run)],
        fpdt_plugin=FPDTPlugin(sp_size=run.sp_size, chunk_tokens=16),
    )
    trainer.train(resume_from_checkpoint=run.resume and str(output / run.resume))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result: dict[str, Any] = {key: [entry[key] for entry in history] for key in ("loss", "grad_norm", "epoch")}
    result["speed_tokens"] = [round(log["tokens_per_second"] * log["step_seconds"]) for log in history]
    result["computed"] = int(trainer.accelerator.gather(torch.tensor([trainer.computed])).sum())
    result["parameters"] = trainer.model.num_parameters(exclude_embeddings=True)
    for batch_size in (1, 2):
        trainer.args.per_device_eval_batch_size = batch_size
        result[f"eval_loss by {batch_size}"] = trainer.evaluate()["eval_loss"]
    prediction = trainer.predict(Rows(5, 50))
    result["test_loss"] = prediction.metrics["test_loss"]
    result["label_rows"] = None if prediction.label_ids is None else len(prediction.label_ids)
    result["batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    result["steps"], result["tokens"] = trainer.state.global_step, trainer.state.total_flos
    result["seen"] = trainer.state.num_input_tokens_seen
    if trainer.args.process_index == 0:
        (output / f"{name}.json").write_text(json.dumps(result))
        torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, output / f"{name}.pt")
    return trainer


def main() -> None:
    output, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, options in runs.items():
        trainer = execute(Run(**options), output, name)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
