"""From text to a LoRA adapter with FPDTTrainer: tokenizer, data, training, and the adapter loaded again.

python examples/tokenizer_to_adapter.py --model Qwen/Qwen3-0.6B --data 'books/*.txt' --output out
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_fpdt import FPDTPlugin, FPDTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="name on the hub, or a folder")
    parser.add_argument("--data", default="books/*.txt", help="text files, one long document each")
    parser.add_argument("--output", default="out", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=32_768, help="tokens of a document at most")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    books = load_dataset("text", data_files=options.data, sample_by="document", split="train")
    data = books.map(
        lambda book: tokenizer(book["text"], truncation=True, max_length=options.length), remove_columns=["text"]
    )

    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="fpdt", dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    # The collator makes labels of the tokens, -100 where it padded; the model shifts them itself.
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = FPDTTrainer(model, arguments, collator, data, fpdt_plugin=FPDTPlugin())
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    print("losses:", *(f"{float(entry['loss']):.4f}" for entry in trainer.state.log_history if "loss" in entry))

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    loaded = PeftModel.from_pretrained(base, options.output)
    ids = torch.tensor([data[0]["input_ids"][:512]])
    print(f"adapter loaded on a fresh base: loss {loaded(input_ids=ids, labels=ids).loss.item():.4f}")


if __name__ == "__main__":
    main()
