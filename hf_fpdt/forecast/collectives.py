"""What a training step costs, by arithmetic: which collectives it makes and the bytes that a rank sends in them.

Ulysses exchanges of FPDT (paper sections 2 and 4.1) are made per layer and chunk; FSDP2 gathers weights per layer.
Tests count both in real steps. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..layout import Chunk, ChunkPlan

# Four whole numbers (rows, tokens, sample, place) and their negatives; 8 bytes each.
AGREEMENT_BYTES = 64
LABEL_COUNT_BYTES = 8
# Three budgets (device, host, files) and their negatives.
BUDGETS_BYTES = 48


@dataclass(frozen=True)
class Exchange:
    """One all-to-all inside a sequence-parallel group.

    Attributes:
        chunk: index of the chunk whose pieces or heads are exchanged.
        tensors: what is exchanged in one call, in the letters of the paper: "q k v", "out", "dout", "dq dk dv", …
        sent_bytes: bytes this rank sends to the other ranks of its group; it receives as many. What it keeps, one part
            in `sp_size`, is not counted.
    """

    chunk: int
    tensors: str
    sent_bytes: int


@dataclass(frozen=True)
class Collectives:
    """Collectives of one rank inside its sequence-parallel group.

    Attributes:
        exchanges: all-to-alls (Ulysses, paper section 2).
        sent_bytes: bytes that the rank sends to others in them.
        reductions: all-reduces.
        reduced_bytes: size in bytes of the tensors reduced, all calls together.
    """

    exchanges: int = 0
    sent_bytes: int = 0
    reductions: int = 0
    reduced_bytes: int = 0

    def __add__(self, other: Collectives) -> Collectives:
        return Collectives(
            self.exchanges + other.exchanges,
            self.sent_bytes + other.sent_bytes,
            self.reductions + other.reductions,
            self.reduced_bytes + other.reduced_bytes,
        )

    def __mul__(self, times: int) -> Collectives:
        return Collectives(
            times * self.exchanges,
            times * self.sent_bytes,
            times * self.reductions,
            times * self.reduced_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class StepCollectives:
    """Sizes of one training step (forward and backward of one batch), and the collectives it makes.

    DDP's collectives, FSDP2's (`ShardedWeights`) and those of Trainer (it counts labels over all ranks) come on top;
    with FSDP2 also an all-reduce a step, in which all ranks agree on the longest sequence. "attention" and "input" of
    `FPDTPlugin.checkpoints` exchange alike: what "input" does not keep is made again from exchanged tensors. Inputs
    that were not kept ("segment", or little memory) are rebuilt, and the layers that run for it exchange once more.

    Attributes:
        n_tokens: tokens of the sequence, over all ranks; filled up to a multiple of `sp_size`.
        chunk_tokens: tokens of a chunk, over all ranks (paper section 4.1).
        sp_size: ranks that share the sequence.
        layers: decoder layers.
        q_heads: query heads of the model; a multiple of `sp_size`.
        kv_heads: key/value heads of the model. Where `sp_size` does not divide them they are repeated until it does.
        head_dim: elements of a head of queries and keys.
        value_dim: elements of a head of values and of attention's output; 0: as many.
        batch: sequences in the batch.
        element_bytes: bytes of an element of q, k, v (2 for bf16).
        backward_layers: layers with a backward pass; None: all. Below the lowest layer that trains there is none.
        frozen_attentions: those of them whose attention needs no gradient: with LoRA on MLPs alone, the lowest.
        rebuilt_layers: layers that run forward again in backward, for the sake of the input above (`Kept.rebuilt`).
        rebuilt_attentions: those of them whose attention runs again, as its output was not kept.
        mean_of_labels: whether the model itself counts the labels of the sequence, as it does in loops of one's own;
            Trainer hands it `num_items_in_batch`.

    Raises:
        ValueError: `sp_size` does not divide `chunk_tokens` or `q_heads`, or more attentions than layers are rebuilt.
    """

    n_tokens: int
    chunk_tokens: int
    sp_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0
    batch: int = 1
    element_bytes: int = 2
    backward_layers: int | None = None
    frozen_attentions: int = 0
    rebuilt_layers: int = 0
    rebuilt_attentions: int = 0
    mean_of_labels: bool = True

    def __post_init__(self) -> None:
        if self.q_heads % self.sp_size:
            raise ValueError(
                f"StepCollectives(q_heads={self.q_heads}): a multiple of sp_size={self.sp_size} is expected."
            )
        if self.rebuilt_attentions > self.rebuilt_layers:
            raise ValueError(
                f"StepCollectives(rebuilt_attentions={self.rebuilt_attentions}): at most rebuilt_layers="
                f"{self.rebuilt_layers} is expected, the layers that they are in."
            )
        _ = self.chunks

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the filled-up sequence, ascending."""
        return ChunkPlan(self.n_tokens + -self.n_tokens % self.sp_size, self.chunk_tokens, self.sp_size).chunks

    @property
    def kv_heads_exchanged(self) -> int:
        """Key/value heads after repeating, over all ranks."""
        return math.lcm(self.kv_heads, self.sp_size)

    def layer_forward(self) -> tuple[Exchange, ...]:
        """The exchanges of one layer's forward pass, in order: two a chunk."""
        return self._made(self._forward())

    def layer_backward(self, *, into_attention: bool = True) -> tuple[Exchange, ...]:
        """The exchanges of one layer's backward pass, in order.

        K and V of every chunk but the last are made again first; then the chunks are replayed from the last to the
        first, and each sends its queries, its output, and (`into_attention`) the gradients of both.
        """
        return self._made(self._backward(into_attention))

    def layer_rebuild(self, *, attention: bool) -> tuple[Exchange, ...]:
        """The exchanges of one layer that runs forward again; `attention`: whether its attention does too."""
        return self._made(self._forward() if attention else ((chunk, "out") for chunk in self.chunks))

    def layers_forward(self) -> Collectives:
        """All layers' forward passes."""
        return _total(self.layer_forward()) * self.layers

    def layers_backward(self) -> Collectives:
        """All layers' backward passes, and what is rebuilt for them."""
        layers = self.layers if self.backward_layers is None else self.backward_layers
        frozen = _total(self.layer_backward(into_attention=False)) * self.frozen_attentions
        return _total(self.layer_backward()) * (layers - self.frozen_attentions) + frozen + self.rebuilds()

    def rebuilds(self) -> Collectives:
        """All layers that run forward again."""
        again = _total(self.layer_rebuild(attention=True)) * self.rebuilt_attentions
        linears = self.rebuilt_layers - self.rebuilt_attentions
        return again + _total(self.layer_rebuild(attention=False)) * linears

    def outside_layers(self) -> Collectives:
        """Around the layers, in the forward pass: the ranks compare their parts, and count the labels."""
        if self.sp_size == 1:
            return Collectives()
        agreement = Collectives(reductions=1, reduced_bytes=AGREEMENT_BYTES)
        counted = Collectives(reductions=1, reduced_bytes=LABEL_COUNT_BYTES)
        return agreement + counted * int(self.mean_of_labels)

    def first_pass(self) -> Collectives:
        """Once a process, before its first step or evaluation: the ranks agree on what each tier may hold."""
        return Collectives() if self.sp_size == 1 else Collectives(reductions=1, reduced_bytes=BUDGETS_BYTES)

    def step(self) -> Collectives:
        """The whole step; the first one makes `first_pass` too."""
        return self.outside_layers() + self.layers_forward() + self.layers_backward()

    def _forward(self) -> Iterator[tuple[Chunk, str]]:
        for chunk in self.chunks:
            yield chunk, "q k v"
            yield chunk, "out"

    def _backward(self, into_attention: bool) -> Iterator[tuple[Chunk, str]]:
        *earlier, last = self.chunks
        for chunk in earlier:
            yield chunk, "k v"
        for chunk in (last, *reversed(earlier)):
            yield chunk, "q k v" if chunk is last else "q"
            yield chunk, "out"
            if into_attention:
                yield chunk, "dout"
                yield chunk, "dq dk dv"

    def _made(self, calls: Iterator[tuple[Chunk, str]]) -> tuple[Exchange, ...]:
        if self.sp_size == 1:
            return ()
        return tuple(Exchange(chunk.index, tensors, self._sent_bytes(chunk, tensors)) for chunk, tensors in calls)

    def _sent_bytes(self, chunk: Chunk, tensors: str) -> int:
        width = sum(self._width(name.removeprefix("d")) for name in tensors.split())
        own_tokens = chunk.rank_stop - chunk.rank_start
        own_bytes = self.batch * own_tokens * width * self.element_bytes
        return own_bytes // self.sp_size * (self.sp_size - 1)

    def _width(self, name: str) -> int:
        """Elements of a token's q, k, v or out."""
        heads = self.kv_heads_exchanged if name in ("k", "v") else self.q_heads
        return heads * (self.head_dim if name in ("q", "k") else self.value_dim or self.head_dim)


def _total(made: tuple[Exchange, ...]) -> Collectives:
    return Collectives(len(made), sum(exchange.sent_bytes for exchange in made))


@dataclass(frozen=True, kw_only=True)
class ShardedWeights:
    """Weights that FSDP2 shards over all ranks, in units as accelerate lays them; sizes in bytes, gathered.

    A unit is gathered for its forward pass and, as it was put back into shards, for its backward pass once more; the
    embedding too where it is frozen, as FSDP2 fetches ahead. What is gathered last stays whole until it is used again.
    A layer that runs again to rebuild an input is gathered for that as well. To gather or to reduce a unit, each rank
    sends all of it but one part in `ranks`.

    Attributes:
        ranks: that share the weights.
        layers: decoder layers, a unit each.
        layer: one of them, adapters included.
        embedding: the unit of the input embedding; 0 where the head is tied to it.
        tail: what stays whole between forward and backward: final norm and head.
        trained: gradients of all that trains.
    """

    ranks: int
    layers: int
    layer: int
    embedding: int
    tail: int
    trained: int

    def gathered_bytes(self) -> int:
        """What a rank sends in a step for weights that are gathered, those of `rebuilt_bytes` left out."""
        return self._sent(2 * (self.layers * self.layer + self.embedding) + self.tail)

    def rebuilt_bytes(self, rebuilt_layers: int) -> int:
        """What it sends for the layers that run again for the input above."""
        return self._sent(rebuilt_layers * self.layer)

    def reduced_bytes(self) -> int:
        """What it sends of gradients."""
        return self._sent(self.trained)

    def _sent(self, nbytes: int) -> int:
        return nbytes * (self.ranks - 1) // self.ranks
