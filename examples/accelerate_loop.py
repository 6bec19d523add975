"""A loop of your own with FPDTAccelerator in place of Accelerator; the same script runs on one process or many.

python examples/accelerate_loop.py
"""

import argparse

import torch
from tiny_text import byte_windows, tiny_llama
from torch.utils.data import DataLoader
from with_trainer import Windows

from hf_fpdt import FPDTAccelerator, FPDTPlugin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    options = parser.parse_args()

    plugin = FPDTPlugin(chunk_tokens=512)  # sp_size=2: two processes share every sequence
    accelerator = FPDTAccelerator(fpdt_plugin=plugin, cpu=not torch.cuda.is_available())
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = Windows(byte_windows(options.length, count=options.steps))  # input_ids, and labels that are the same
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(windows))

    model.train()
    for step, batch in enumerate(loader, start=1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
