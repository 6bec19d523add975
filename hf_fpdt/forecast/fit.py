"""Whether a training step fits given machines, what it takes where and how long.

Arithmetic only, from a model's configuration: the rules that place checkpoints at run time and the table of device
memory, both of the room plan, and the rates of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

from ..layout import ChunkPlan, chunk_choices
from ..plan import (
    DEVICE_MARGIN,
    DEVICE_RESERVE,
    HOST_RESERVE,
    NO_LIMIT,
    Budgets,
    ModelSizes,
    PassPlacement,
    StepSizes,
    plan_pass,
    state_bytes,
    strict_flops,
    sum_bytes,
    under_way_bytes,
)
from ..units import GIB, page_rounded
from .collectives import ShardedWeights
from .corpus import Corpus
from .rates import GPU
from .seconds import sharded_seconds, step_seconds, ulysses_seconds

# Of the memory that a machine is sold with, what its system shows.
HOST_USABLE = 0.98
# Of an element of a weight that trains under FSDP2: accelerate upcasts it, with its gradient and optimizer states.
FP32_BYTES = 4
# Buffers of NCCL's communicators, Ulysses' and DDP's, as seen on four GPUs of one host.
NCCL_BYTES = int(1.3 * GIB)


class Use(Enum):
    """What memory is used for: arithmetic goes by the member, JSON by its value, and what people read is elsewhere."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    SUMS = "sums of gradients over chunks"
    NCCL = "NCCL"
    WORKING = "activations and gradients of a step"
    KV = "K, V, dK, dV"
    CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters of a model, and what training keeps of them.

    Attributes:
        total: all of them.
        trained: those that train.
        largest_trained: the most that train in one layer, or outside of the layers: their gradients add up in fp32.
        outside: embeddings, final norm and head.
        element_bytes: of weights, gradients and optimizer states.
        packed: of `total`, those that are quantised.
        packed_bytes: of all of them, with their scales and tables.
        layer_bytes: of each layer, its frozen weights side by side in host memory.
        optimizer: a kind of `OPTIMIZERS`.
    """

    total: int
    trained: int
    largest_trained: int
    outside: int
    element_bytes: int = 2
    packed: int = 0
    packed_bytes: int = 0
    layer_bytes: tuple[int, ...] = ()
    optimizer: str = "adamw"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What is available, all machines together.

    Attributes:
        gpu: their kind.
        gpus: how many, all of one sequence-parallel group.
        host_bytes: host memory.
        disk_bytes: free space for files.
        sharded: whether FSDP2 shards weights, gradients and optimizer over all GPUs, those that train in fp32, as
            accelerate has them under mixed precision; else each has all of them (DDP).
        kept_bytes: the most of each GPU for K, V and checkpoints (`FPDTPlugin.device_budget_gib`); None: what is left.
    """

    gpu: GPU
    gpus: int
    host_bytes: int
    disk_bytes: int = 0
    sharded: bool = False
    kept_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be trained.

    Attributes:
        model: its sizes.
        weights: its parameters.
        vocabulary: logits a token.
        chunk_tokens: tokens of a chunk, over all GPUs.
        documents: what a packed row is made of; None: a row is one document.
        host_weights: whether layers' frozen weights wait in host memory, `FPDTPlugin.host_weights`.
        auto_chunk: whether `chunk_tokens` is the most that "auto" takes; one GPU takes less where that does not fit.
        loss_tokens: tokens whose logits exist at a time.
        checkpoints: `FPDTPlugin.checkpoints`.
        fused: whether Liger's kernels are installed, and `FPDTPlugin.fused`.
        fused_experts: whether the model's experts are such as run as one operation then.
    """

    model: ModelSizes
    weights: Weights
    vocabulary: int
    chunk_tokens: int
    loss_tokens: int
    checkpoints: str = "auto"
    fused: bool = True
    fused_experts: bool = True
    host_weights: bool = False
    auto_chunk: bool = False
    documents: Corpus | None = None

    @property
    def waiting(self) -> int:
        """Bytes of weights in the host memory of each process."""
        return sum(map(page_rounded, self.weights.layer_bytes)) if self.host_weights else 0

    def step(self, n_tokens: int, sp_size: int) -> StepSizes:
        """Sizes of a step of one sequence."""
        plan = ChunkPlan(n_tokens + -n_tokens % sp_size, self.chunk_tokens, sp_size)
        fetched = max(self.weights.layer_bytes) if self.host_weights else 0
        return StepSizes(
            replace(self.model, fetched_bytes=fetched),
            plan,
            loss_tokens=self.loss_tokens,
            vocabulary=self.vocabulary,
            fused=self.fused,
            fused_experts=self.fused and self.fused_experts,
            documents=None if self.documents is None else self.documents.row(plan.n_tokens),
        )


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step that fits.

    Attributes:
        step: its sizes.
        weights: of the model.
        plan: where checkpoints, K and V go.
        device: bytes set aside on each GPU, by what they are, margins included.
        peak: bytes of each GPU that PyTorch's allocator is predicted to reach, without margins.
        host: pinned bytes on the hosts, all together.
        host_weights: of these, weights.
        seconds: of the step.
        strict_mfu: of all GPUs; no recomputation counted, attention at half.
        copy_seconds: what the host's link needs for the checkpoints, which is under computation if it is less.
        exchange_seconds: of `seconds`, those in which GPUs send each other what computation waits for.
        gather_seconds: what weights and gradients need between the GPUs that shard them, beside computation;
            `seconds` counts what is longer.
    """

    step: StepSizes
    weights: Weights
    plan: PassPlacement
    device: tuple[tuple[Use, int], ...]
    peak: int
    host: int
    host_weights: int
    seconds: float
    strict_mfu: float
    copy_seconds: float
    exchange_seconds: float
    gather_seconds: float


def fit(training: Training, machines: Machines, n_tokens: int) -> PlannedStep:
    """What a step of `n_tokens` takes; where the chunk is nobody's choice, with the largest chunk that fits.

    Raises:
        MemoryError: it does not fit; the message has the arithmetic.
    """
    if not training.auto_chunk or machines.gpus > 1 or machines.sharded:
        return _fit(training, machines, n_tokens)
    *larger, least = chunk_choices(training.chunk_tokens)
    for chunk_tokens in larger:
        with suppress(MemoryError):
            return _fit(replace(training, chunk_tokens=chunk_tokens), machines, n_tokens)
    return _fit(replace(training, chunk_tokens=least), machines, n_tokens)


def _fit(training: Training, machines: Machines, n_tokens: int) -> PlannedStep:
    step, gpu, weights = training.step(n_tokens, machines.gpus), machines.gpu, training.weights
    fixed = _fixed_bytes(training, machines)
    working = int(DEVICE_MARGIN * step.working_bytes(step.kv_bytes(NO_LIMIT))) + DEVICE_RESERVE
    room = int(gpu.memory_gib * GIB) - sum(size for _, size in fixed) - working
    if room < 0:
        raise MemoryError(
            f"{n_tokens:,} tokens need {(int(gpu.memory_gib * GIB) - room) / GIB:.1f} GiB of each {gpu.name}'s "
            f"{gpu.memory_gib:.1f}, checkpoints, K and V not counted."
        )
    host = max(0, int(HOST_USABLE * machines.host_bytes) - HOST_RESERVE) // machines.gpus - training.waiting
    if host < 0:
        raise MemoryError(
            f"the weights of the layers need {training.waiting / GIB:.1f} GiB of host memory for each GPU, "
            f"{-host / GIB:.1f} GiB more than there is. Ways out: quantised weights, or more host memory."
        )
    ring = step.kv_bytes(0).device_bytes
    if room < ring:
        raise MemoryError(
            f"{n_tokens:,} tokens need {(ring - room) / GIB:.1f} GiB more of each {gpu.name} than it has, for the "
            "keys and values that a window reaches."
        )
    kept = room if machines.kept_bytes is None else min(room, machines.kept_bytes)
    budgets = Budgets(kept, host, machines.disk_bytes // machines.gpus)
    plan = plan_pass(training.checkpoints, step, training.model.layers, budgets)
    full = weights.trained == weights.total
    gathering, in_the_way = 0.0, 0.0
    if machines.sharded:
        gathering, in_the_way = sharded_seconds(sharded_weights(training, machines.gpus), plan.kept, gpu)
    exchange = ulysses_seconds(step, plan.kept, gpu) + in_the_way
    fetching = (2 * step.model.layers + plan.kept.rebuilt) * step.model.fetched_bytes / gpu.link
    # The first layer of a step is waited for.
    first = step.model.fetched_bytes / gpu.link
    seconds = max(step_seconds(step, plan.kept, gpu, full=full), gathering, fetching) + exchange + first
    items = (*fixed, (Use.WORKING, working), (Use.KV, plan.kv.device_bytes))
    away = under_way_bytes(plan.kept, step.layer_bytes())
    elsewhere = plan.forecast.host_bytes - plan.kv.host_bytes + plan.forecast.disk_bytes
    return PlannedStep(
        step=step,
        weights=weights,
        plan=plan,
        device=(*items, (Use.CHECKPOINTS, plan.forecast.device_bytes + away)),
        peak=_peak(step, plan, training, dict(fixed)),
        host=(plan.forecast.host_bytes + training.waiting) * machines.gpus,
        host_weights=training.waiting * machines.gpus,
        seconds=seconds,
        strict_mfu=strict_flops(step.model, step.vocabulary, step.plan.n_tokens, full=full, documents=step.documents)
        / seconds
        / machines.gpus
        / gpu.peak,
        copy_seconds=2 * elsewhere / gpu.link + fetching,
        exchange_seconds=exchange,
        gather_seconds=gathering,
    )


def peak_bytes(step: StepSizes, plan: PassPlacement, outside: int, inside: int, sums: int) -> int:
    """The most that a step puts on each GPU beside weights and optimizer states, without the margins of a plan.

    Args:
        step: its sizes.
        plan: where checkpoints, K and V go.
        outside: bytes of gradients outside of the layers.
        inside: of gradients of all layers.
        sums: of the gradients of one layer while they add up over chunks.
    """
    forecast = plan.forecast
    elsewhere = forecast.host_bytes > plan.kv.host_bytes
    working = step.working_bytes(plan.kv, checkpoints_elsewhere=elsewhere, resident=True)
    working += under_way_bytes(plan.kept, step.layer_bytes(plan.kept.layers))
    # A layer's checkpoints go when its gradients come.
    return working + outside + max(sums + forecast.device_bytes, inside + forecast.device_bytes // plan.kept.layers)


def _peak(step: StepSizes, plan: PassPlacement, training: Training, fixed: Mapping[Use, int]) -> int:
    weights = training.weights
    outside = weights.outside if weights.trained == weights.total else 0
    inside = weights.trained - outside
    apart, within = (fixed[Use.GRADIENTS] * part // weights.trained for part in (outside, inside))
    sums = sum_bytes(inside // training.model.layers)
    return fixed[Use.WEIGHTS] + fixed[Use.OPTIMIZER] + peak_bytes(step, plan, apart, within, sums)


def sharded_weights(training: Training, ranks: int) -> ShardedWeights:
    """What FSDP2 shards, in its units."""
    model, weights, size = training.model, training.weights, training.weights.element_bytes
    embedding = training.vocabulary * model.hidden
    if weights.outside < 2 * embedding:  # the head is the embedding
        embedding = 0
    return ShardedWeights(
        ranks=ranks,
        layers=model.layers,
        layer=model.layer_parameters * size,
        embedding=embedding * size,
        tail=(weights.outside - embedding) * size,
        trained=weights.trained * size,
    )


def _fixed_bytes(training: Training, machines: Machines) -> tuple[tuple[Use, int], ...]:
    """What lies on each GPU whatever the length."""
    weights, layer = training.weights, training.model.layer_parameters
    ranks, size, trained = 1, weights.element_bytes, weights.element_bytes
    gathered = 0
    if machines.sharded:
        ranks, trained = machines.gpus, FP32_BYTES
        # The layer that runs and the next one; embeddings and head stay gathered.
        gathered = (2 * layer + weights.outside) * size
    frozen = (weights.total - weights.trained - weights.packed) * size + weights.packed_bytes
    if training.host_weights:
        frozen = weights.outside * size  # embeddings, final norm and head stay
    lasting = frozen + weights.trained * trained
    nccl = ((Use.NCCL, NCCL_BYTES),) if machines.gpus > 1 else ()
    return (
        (Use.WEIGHTS, lasting // ranks + gathered),
        (Use.GRADIENTS, weights.trained * trained // ranks),
        (Use.OPTIMIZER, state_bytes(weights.optimizer, weights.trained, trained) // ranks),
        (Use.SUMS, sum_bytes(weights.largest_trained)),
        *nccl,
    )


def machine_bytes(pinned: int) -> int:
    """Host memory of the machines of which so much can be pinned."""
    return math.ceil((pinned + HOST_RESERVE) / HOST_USABLE) if pinned else 0
