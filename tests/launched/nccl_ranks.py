"""What several GPUs compute together, for `test_nccl.py`: torchrun --nproc-per-node 2 tests/launched/nccl_ranks.py OUT

Llama-3.1-8B's width, two layers, bfloat16, two sequences of 16K tokens, 8, 2 and 1 key heads. Every case's loss and
gradients are held against float32 ones of one GPU; OUT gets a line for each: how many times plain Hugging Face's error
in bfloat16 the worst one is. Without GPUs it does the same with gloo and tiny sizes, in float32 against float64.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fpdt.commands.accuracy import Tensors, Worst, errors, least_of_dtype, worst
from hf_fpdt.commands.bench.parity import results, sharpen
from hf_fpdt.commands.bench.ranks import World, join, leave, place
from hf_fpdt.commands.bench.stacks.base import Pieces, Stack, base_of
from hf_fpdt.commands.bench.stacks.catalogue import Fpdt
from hf_fpdt.model.shapes import build_random, llama_8b, with_layers
from tests.helpers.bench_stacks import LostPart, NotReduced, OwnMean

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE, EXACT = ("cuda", torch.bfloat16, torch.float32) if ON_GPU else ("cpu", torch.float32, torch.float64)
N_TOKENS, CHUNK_TOKENS, IGNORED_TOKENS = (16_384, 4096, 5000) if ON_GPU else (512, 128, 150)
SEQUENCES = 2
KEY_HEADS = (8, 2, 1)


class Ddp(Fpdt):
    """Ulysses; every weight on every GPU."""

    def _is_sharded(self, model: nn.Module) -> bool:
        return False


class DataParallelFsdp(Fpdt):
    """A sequence on each GPU; weights under FSDP2."""

    def _sp_size(self) -> int:
        return 1

    def _own_part(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Any]:
        own = slice(self.world.rank, self.world.rank + 1)
        return super()._own_part(ids_BS[own], labels_BS[own])


class DataParallelDdp(DataParallelFsdp):
    """A sequence on each GPU; every weight on every GPU."""

    def _is_sharded(self, model: nn.Module) -> bool:
        return False


def repeated_attention(
    module: nn.Module, query_BNSH: Tensor, key_BGSH: Tensor, value_BGSH: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """torch's own, with key heads repeated before: it has no float32 kernel for few of them."""
    times = query_BNSH.shape[1] // key_BGSH.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key_BGSH, value_BGSH))
    out = scaled_dot_product_attention(query_BNSH, key, value, is_causal=True, scale=options["scaling"])
    return out.transpose(1, 2).contiguous(), None


class Alone(Stack):
    """One GPU, one sequence after the other, so that exact logits find room."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        losses = [
            super(Alone, self).loss_and_backward(model, *row)
            for row in zip(ids_BS.split(1), labels_BS.split(1), strict=True)
        ]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(losses)
        return torch.stack(losses).mean()


class Case:
    """One model, its tokens, and what is true of it."""

    def __init__(self, world: World, key_heads: int, lora: bool) -> None:
        self._world = world
        torch.manual_seed(key_heads)
        self._model = build_random(config(key_heads), DEVICE, DTYPE, lora)
        sharpen(self._model)
        self._ids = torch.randint(0, 1000, (SEQUENCES, N_TOKENS), generator=torch.Generator().manual_seed(0)).to(
            DEVICE
        )
        self._labels = self._ids.clone()
        # More of them on rank 0 than on another.
        self._labels[:, :IGNORED_TOKENS] = -100
        exact = copy.deepcopy(self._model).to(EXACT)
        base_of(exact).set_attn_implementation("repeated")
        self._truth = self._results(Alone(), exact)
        del exact
        self._naive = errors(self._results(Alone(), copy.deepcopy(self._model)), self._truth)

    def _results(self, stack: Stack, model: nn.Module) -> Tensors:
        return results(stack, model, self._ids, self._labels)

    def verdict(self, kind: type[Stack]) -> dict[str, Any]:
        """Of all ranks, the worst."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # Accelerate leaves it for the next one, which may be of DDP.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        stack, model = kind(), copy.deepcopy(self._model)
        stack.world = self._world
        stack.prepare(model, Pieces(most_tokens=CHUNK_TOKENS))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        ours = errors(self._results(stack, stack.spread(model, optimizer)[0]), self._truth)
        found = worst(ours, self._naive, least_of_dtype(self._truth, DTYPE))
        found = max(self._world.gather(found), key=Worst.badness)
        return {"ratio": found.ratio, "of": found.name, "passed": found.passed}


def config(key_heads: int) -> LlamaConfig:
    if ON_GPU:
        found: Any = with_layers(llama_8b(), 2)
    else:
        sizes: Mapping[str, int] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        found = LlamaConfig(vocab_size=1000, num_attention_heads=8, head_dim=16, **sizes)
    found.num_key_value_heads = key_heads
    return found


EVERY_WEIGHT: Mapping[str, type[Stack]] = {
    "Ulysses, FSDP2": Fpdt,
    "Ulysses, DDP": Ddp,
    "data parallel, FSDP2": DataParallelFsdp,
    "data parallel, DDP": DataParallelDdp,
}
ADAPTERS: Mapping[str, type[Stack]] = {
    "Ulysses, DDP": Fpdt,
    "wrong: each rank its own mean": OwnMean,
    "wrong: a rank's part lost": LostPart,
    "wrong: gradients not reduced": NotReduced,
}


def main(out: Path) -> None:
    world = place(int(os.environ["WORLD_SIZE"]))
    join(world, DEVICE)
    ALL_ATTENTION_FUNCTIONS.register("repeated", repeated_attention)
    for key_heads in KEY_HEADS:
        for lora, kinds in ((False, EVERY_WEIGHT), (True, ADAPTERS)):
            if lora and key_heads != KEY_HEADS[0]:
                continue
            case = Case(world, key_heads, lora)
            for name, kind in kinds.items():
                verdict = case.verdict(kind)
                gc.collect()
                trained = "LoRA" if lora else "every weight"
                row = {"key_heads": key_heads, "trained": trained, "case": name, **verdict}
                if world.rank == 0:
                    print(json.dumps(row), flush=True)
                    with out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            del case
            gc.collect()
    leave(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
