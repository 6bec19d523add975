"""TRL's GRPOTrainer with the mixin: questions about long documents, rewarded by whether the answer is there.

python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --data 'questions/*.jsonl' --output out

A line of the data: {"prompt": "a document and a question about it", "answer": "..."}. Prompts may differ in length.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hf_fpdt import FPDTPlugin, FPDTTrainerMixin


class FPDTGRPOTrainer(FPDTTrainerMixin, GRPOTrainer):
    """The mixin comes first."""


def found(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """The share of the answer's words that a completion has."""
    pairs = zip(completions, answer, strict=True)
    return [sum(word in completion for word in right.split()) / len(right.split()) for completion, right in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="name on the hub, or a folder")
    parser.add_argument("--data", default="questions/*.jsonl", help="a prompt and its answer a line")
    parser.add_argument("--output", default="out", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion at most")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    arguments = GRPOConfig(
        output_dir=options.output,
        max_completion_length=options.length,
        num_generations=4,
        per_device_train_batch_size=4,  # the completions of one prompt
        temperature=0.9,
        max_steps=options.steps,
        learning_rate=1e-3,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = FPDTGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="fpdt", dtype=dtype),
        reward_funcs=found,
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        fpdt_plugin=FPDTPlugin(),
    )
    trainer.train()
    trainer.save_model()
    print("rewards:", *(f"{entry['reward']:.4f}" for entry in trainer.state.log_history if "reward" in entry))


if __name__ == "__main__":
    main()
