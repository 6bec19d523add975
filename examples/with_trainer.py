"""hf_fpdt under transformers' Trainer: apply_fpdt on the model, everything else as ever.

python examples/with_trainer.py
"""

import argparse
import tempfile

import torch
from tiny_text import byte_windows, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_fpdt import FPDTPlugin, apply_fpdt


class Windows(torch.utils.data.Dataset):
    """Rows of a tensor as examples with labels; the model shifts them itself."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    options = parser.parse_args()

    model = tiny_llama()
    apply_fpdt(model, FPDTPlugin(chunk_tokens=512))
    print(f"{options.steps} steps of two sequences of {options.length} tokens each, in chunks of 512")

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Windows(byte_windows(options.length, count=12)))
        trainer.train()

    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print("losses:", *(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
