"""TRL's SFTTrainer on trajectories of an agent: conversations with tools, of which the assistant's turns are learned.

python examples/trl_agents.py --model Qwen/Qwen3-0.6B --data 'trajectories/*.jsonl' --output out

A line of the data is a trajectory: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_fpdt import FPDTPlugin, FPDTTrainerMixin

# For a tokenizer without a template; what is between the generation tags is learned.
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)


class FPDTSFTTrainer(FPDTTrainerMixin, SFTTrainer):
    """The mixin comes first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="name on the hub, or a folder")
    parser.add_argument("--data", default="trajectories/*.jsonl", help="a trajectory a line")
    parser.add_argument("--output", default="out", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=131_072, help="tokens of a trajectory at most")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    arguments = SFTConfig(
        output_dir=options.output,
        max_length=options.length,
        assistant_only_loss=True,  # what users and tools say is read, not learned
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    trainer = FPDTSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="fpdt", dtype=dtype),
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        fpdt_plugin=FPDTPlugin(),
    )
    trainer.train()
    trainer.save_model()
    print("losses:", *(f"{float(entry['loss']):.4f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main()
