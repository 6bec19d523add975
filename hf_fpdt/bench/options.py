"""The options of `hf-fpdt bench`, and the words of its help."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import amount, count, tokens
from .catalogue import STACKS

LIMIT_S = 1800

HELP = """\
Measures training steps (forward, loss, backward, optimizer) of one model under several ways to train it ("stacks"),
each stack and length in a process of its own, so that running out of memory is a line of the table and not its end.

No stack gets a speed before its loss and gradients were compared with plain Hugging Face: against float64, their error
may be at most twice that of plain Hugging Face in the same dtype. One that fails gets a line that says so.

Weights and tokens are random and the same for all: the sizes are what matters, so of a model only the configuration is
read. Without a GPU it runs too, for small models; the columns that need one stay empty.

stacks:
"""
EXAMPLES = """\
examples:
  hf-fpdt bench --seq-len 32K 64K --stacks fpdt hf liger      Llama-3.1-8B's shape, LoRA, three stacks
  hf-fpdt bench --shape llama-1b --full --seq-len 128K --csv steps.csv
  hf-fpdt bench ./my-model --layers 4 --seq-len 16K           a model folder's own shape, four layers of it
  hf-fpdt bench --gpus 2 --seq-len 128K --stacks fpdt         two GPUs share the sequence
  hf-fpdt bench --longest --stacks fpdt hf-offload            the longest sequence that completes a step

FPDT's settings beside the chunk are taken from FPDT_* variables, as in training. A stack of your own is module:Class,
a subclass of hf_fpdt.bench.stack.Stack.
"""


def description() -> str:
    """What the command does, and every stack in a line."""
    return HELP + "\n".join(f"  {name:<11} {kind.about}" for name, kind in STACKS.items())


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but MODEL and --shape."""
    what = parser.add_argument_group("what to measure")
    what.add_argument("--stacks", nargs="+", default=["fpdt", "hf"], metavar="STACK", help="default: fpdt hf")
    what.add_argument(
        "--seq-len", type=tokens, nargs="+", default=[32_768], metavar="TOKENS", help="8192 128K 1M … (default: 32K)"
    )
    what.add_argument(
        "--longest",
        action="store_true",
        help="of each stack the longest sequence that completes a step, to about 3 %%, looked for among "
        "and from the given --seq-len on",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--layers", type=count, help="layers of the model to keep (default: all)")
    how.add_argument("--full", action="store_true", help="train every weight (default: LoRA, rank 16, all linears)")
    how.add_argument("--chunk-tokens", type=tokens, metavar="TOKENS", help="FPDT's chunk (default: its own choice)")
    how.add_argument(
        "--steps", type=count, default=3, help="steps, the first left out of the median (default: %(default)s)"
    )
    how.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    how.add_argument(
        "--gpus",
        type=count,
        default=1,
        metavar="N",
        help="GPUs of this host that train one model together, a process each; with --device cpu so many processes "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--held-gib",
        type=amount,
        default=0.0,
        metavar="GIB",
        help="memory of each GPU to take away first, as that of the layers left out by --layers (default: none)",
    )
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: the GPU, if any")
    how.add_argument(
        "--limit",
        type=count,
        default=LIMIT_S,
        metavar="SECONDS",
        help="end what takes longer; that is a line too (default: %(default)s)",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--csv", type=Path, metavar="FILE", help="every figure and condition, added as lines")
    output.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON, an object a line")
