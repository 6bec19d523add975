"""What the tests of the stores share: sizes with odd numbers, random plans, tiers in plain memory, a layer's run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_fpdt import FPDTPlugin
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.memory.checkpoints import CheckpointStore
from hf_fpdt.memory.pinned import PinnedMemory
from hf_fpdt.memory.transfers import Transfers
from hf_fpdt.parallel.group import build_group
from hf_fpdt.plan.checkpointing import KeptChunks, KeptLayers
from hf_fpdt.plan.layer_bytes import LayerBytes, LinearBytes
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.sizes import StepSizes
from hf_fpdt.plan.tiers import Budgets, BufferPool, TierAllocator
from hf_fpdt.units import GIB

CPU = torch.device("cpu")
NO_LIMIT = 2**62
TINY = ModelSizes(
    layers=4, hidden=32, intermediate=48, q_heads=4, kv_heads=2, head_dim=8, rotary_dim=8, layer_parameters=9000
)


def sizes_of(rng: random.Random, chunks: int, *, most: int = 40) -> LayerBytes:
    """Unequal sizes of every chunk."""
    inputs, outs = ([rng.randrange(1, most) for _ in range(chunks)] for _ in range(2))
    lses = [rng.randrange(1, max(2, most // 8)) for _ in range(chunks)]
    return LayerBytes(tuple(inputs), tuple(outs), tuple(lses))


def random_kept(rng: random.Random, layers: int) -> KeptLayers:
    """Any mask of inputs that starts with one, any mask of attention outputs."""
    share = rng.random()
    inputs = [True, *(rng.random() < share for _ in range(layers - 1))]
    return KeptLayers(tuple(inputs), tuple(rng.random() < 0.5 for _ in range(layers)))


def with_linears(
    rng: random.Random, kept: KeptLayers, sizes: LayerBytes, lengths: list[int]
) -> tuple[KeptLayers, LayerBytes]:
    """The same with up to three linears a layer, early or late, of some of whose chunks the output is kept."""
    chunks, layers, counts = len(lengths), list[tuple[LinearBytes, ...]](), list[tuple[KeptChunks, ...]]()
    for _ in range(kept.layers):
        several = range(rng.randrange(4))
        layers.append(
            tuple(LinearBytes(f"linear {i}", rng.random() < 0.5, tuple(n * (i + 1) for n in lengths)) for i in several)
        )
        some = [rng.randrange(chunks + 1) for _ in several]
        counts.append(tuple(KeptChunks(count, rng.randrange(count + 1)) for count in some))
    return replace(kept, linears=tuple(counts)), replace(sizes, linears=tuple(layers))


def tiers(*, device: int = 0, host: int = NO_LIMIT, disk: int = 0) -> TierAllocator[Tensor]:
    """Shelves over unpinned memory."""
    return TierAllocator(Budgets(device, host, disk), BufferPool(PinnedMemory(CPU).buffer, host))


def transfers() -> Transfers:
    """Copies on the CPU."""
    return Transfers(CPU)


def step_of(n_tokens: int, chunk_tokens: int, *, model: ModelSizes = TINY, element_bytes: int = 4) -> StepSizes:
    """A step of one sequence."""
    plan = ChunkPlan(n_tokens, chunk_tokens)
    return StepSizes(model, plan, element_bytes=element_bytes, attention_bytes=element_bytes)


@dataclass
class FakeRun:
    """What a checkpoint store asks of a layer's run."""

    index: int
    step: StepSizes = field(default_factory=lambda: step_of(20, 8))
    sharded: bool = False
    __hash__ = object.__hash__


@contextmanager
def checkpoint_store(
    *, device: float = 0, host: float = NO_LIMIT, disk_dir: str | None = None, policy: str = "attention"
) -> Iterator[CheckpointStore]:
    """A store with budgets in bytes, closed at the end."""
    plugin = FPDTPlugin(
        checkpoints=policy, device_budget_gib=device / GIB, host_budget_gib=host / GIB, disk_dir=disk_dir
    )
    store = CheckpointStore(plugin, build_group(1))
    try:
        yield store
    finally:
        store.close()
