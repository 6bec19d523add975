"""A small Trainer run that `test_launch.py` starts with `accelerate launch`; results go to a JSON and a weights file.

accelerate launch ... tests/launched/train.py --sp-size 2 --output DIR [--steps 3] [--resume-at 2] ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from hf_fpdt import FPDTPlugin, FPDTTrainer


class Bytes(Dataset):
    """Windows of a standard-library file, a token a byte; `length` odd, so that ranks need padding."""

    def __init__(self, rows: int, first: int, length: int = 47) -> None:
        text = Path(argparse.__file__).read_bytes()
        self.rows = [list(text[i * length : (i + 1) * length]) for i in range(first, first + rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


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
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sp-size", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-batch-size", type=int, default=2)
    parser.add_argument("--grad-accum", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--fail-on-rank", type=int, default=-1)
    return parser.parse_args()


def arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        dataloader_num_workers=options.workers,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([feature[name] for feature in features]) for name in ("input_ids", "labels")}


def main() -> None:
    options = parse()
    trainer = FPDTTrainer(
        model=tiny_model(options.lora),
        args=arguments(options),
        train_dataset=Bytes(24, 0),
        eval_dataset=Bytes(13, 30),
        data_collator=collate,
        fpdt_plugin=FPDTPlugin(sp_size=options.sp_size, chunk_tokens=16),
    )
    if trainer.args.process_index == options.fail_on_rank:
        raise RuntimeError("this rank was told to fail")
    trainer.train(resume_from_checkpoint=options.resume)
    evaluation = trainer.evaluate()
    test_loss = trainer.predict(Bytes(5, 50)).metrics["test_loss"]
    if trainer.args.process_index == 0:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "losses": [entry["loss"] for entry in history],
            "grad_norms": [entry["grad_norm"] for entry in history],
            "epochs": [entry["epoch"] for entry in history],
            "eval_loss": evaluation["eval_loss"],
            "test_loss": test_loss,
            "batch_size": trainer.get_total_train_batch_size(trainer.args),
        }
        (options.output / "result.json").write_text(json.dumps(result))
        torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, options.output / "weights.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
