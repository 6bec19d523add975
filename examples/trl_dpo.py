"""TRL's DPOTrainer with the mixin: preferences between long answers, or between answers to long prompts.

python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --data 'preferences/*.jsonl' --output out

A line of the data is a preference: {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_fpdt import FPDTPlugin, FPDTTrainerMixin


class FPDTDPOTrainer(FPDTTrainerMixin, DPOTrainer):
    """The mixin comes first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="name on the hub, or a folder")
    parser.add_argument("--data", default="preferences/*.jsonl", help="a preference a line")
    parser.add_argument("--output", default="out", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=65_536, help="tokens of a prompt with an answer at most")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    arguments = DPOConfig(
        output_dir=options.output,
        max_length=options.length,
        beta=0.1,
        max_steps=options.steps,
        per_device_train_batch_size=1,  # a chosen and a rejected answer
        learning_rate=1e-3,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = FPDTDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="fpdt", dtype=dtype),
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        # The reference is the same model without the adapter.
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        fpdt_plugin=FPDTPlugin(),
    )
    trainer.train()
    trainer.save_model()
    print("losses:", *(f"{float(entry['loss']):.4f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main()
