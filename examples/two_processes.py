"""Two processes share every sequence (sp_size=2), on two GPUs or on the CPU.

torchrun --nproc-per-node 2 examples/two_processes.py

On a CPU `accelerate launch --multi_gpu --num_processes 2` does the same; with `--cpu` it would start one process.
"""

import argparse
import tempfile

import torch
from tiny_text import byte_windows, tiny_llama
from transformers import TrainingArguments
from with_trainer import Windows

from hf_fpdt import FPDTPlugin, FPDTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence, of both processes together")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=3e-3,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = FPDTTrainer(
            model=tiny_llama(),
            args=arguments,
            train_dataset=Windows(byte_windows(options.length, count=12)),
            fpdt_plugin=FPDTPlugin(sp_size=2, chunk_tokens=512),
        )
        trainer.train()
    if trainer.is_world_process_zero():
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        print(f"losses of {trainer.args.world_size} processes:", *(f"{loss:.4f}" for loss in losses))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
