"""hf_fpdt with PEFT LoRA: adapters on every linear layer, a frozen base, sequences in chunks.

python examples/lora.py
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_text import byte_windows, tiny_llama

from hf_fpdt import FPDTPlugin, apply_fpdt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    options = parser.parse_args()

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=512))  # before or after get_peft_model, as you like
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"training {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters")

    windows = byte_windows(options.length, count=options.steps)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step, window in enumerate(windows, start=1):
        loss = model(input_ids=window[None], labels=window[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained_loss = model(input_ids=windows[:1], labels=windows[:1]).loss.item()
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_llama(), folder)
        loaded_loss = loaded(input_ids=windows[:1], labels=windows[:1]).loss.item()
    print(f"adapter saved and loaded on a fresh base: loss {trained_loss:.6f} before, {loaded_loss:.6f} after")


if __name__ == "__main__":
    main()
