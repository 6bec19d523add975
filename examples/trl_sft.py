"""TRL's SFTTrainer with the mixin: its tokenisation, its loss, layers in chunks.

python examples/trl_sft.py --model Qwen/Qwen3-0.6B --data 'books/*.txt' --output out
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_fpdt import FPDTPlugin, FPDTTrainerMixin


class FPDTSFTTrainer(FPDTTrainerMixin, SFTTrainer):
    """The mixin comes first; DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer take it in the same way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="name on the hub, or a folder")
    parser.add_argument("--data", default="books/*.txt", help="text files, one long document each")
    parser.add_argument("--output", default="out", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=32_768, help="tokens of a document at most")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    arguments = SFTConfig(
        output_dir=options.output,
        max_length=options.length,
        packing=True,  # several texts a row, none of which sees another
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
        train_dataset=load_dataset("text", data_files=options.data, sample_by="document", split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        fpdt_plugin=FPDTPlugin(),
    )
    trainer.train()
    trainer.save_model()
    print("losses:", *(f"{float(entry['loss']):.4f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main()
