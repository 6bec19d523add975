"""hf_fpdt in a plain PyTorch loop: sequences of 4,096 tokens, never more than 512 of them in a layer at a time.

python examples/plain_loop.py
"""

import argparse

import torch
from tiny_text import byte_windows, tiny_llama

from hf_fpdt import FPDTPlugin, apply_fpdt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    options = parser.parse_args()

    model = tiny_llama()
    windows = byte_windows(options.length, count=options.steps)
    print(f"{options.steps} steps on sequences of {options.length} tokens in chunks of 512")

    # Exactness first: the same loss with FPDT as without.
    with torch.no_grad():
        plain_loss = model(input_ids=windows[:1], labels=windows[:1]).loss.item()
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=512))
    with torch.no_grad():
        chunked_loss = model(input_ids=windows[:1], labels=windows[:1]).loss.item()
    print(f"loss before training: {plain_loss:.6f} whole, {chunked_loss:.6f} chunk by chunk")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, window in enumerate(windows, start=1):
        output = model(input_ids=window[None], labels=window[None])  # the loss; output.logits is None
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {output.loss.item():.4f}")

    handle.remove()  # the stock model again, with the trained weights
    print(f"after handle.remove(): logits of shape {tuple(model(input_ids=windows[:1, :8]).logits.shape)}")


if __name__ == "__main__":
    main()
