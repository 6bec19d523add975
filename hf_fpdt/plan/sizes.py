"""How many bytes a training step needs: what layers would keep, K and V, and what grows on the GPU.

Sizes are those of one rank. Letters: B batch, S tokens of the sequence, P ranks that share it, D hidden size, N query
heads, G key/value heads, H head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..layout import ChunkPlan
from ..units import page_rounded
from .by_layer import attention_sizes, by_layer, largest, one_value


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer would keep, by chunk, on one rank.

    Attributes:
        inputs: the layer's input.
        outs: attention's output for this rank's heads.
        lses: its lse.
    """

    inputs: tuple[int, ...]
    outs: tuple[int, ...]
    lses: tuple[int, ...]

    @cached_property
    def input_total(self) -> int:
        """Of all chunks."""
        return sum(self.inputs)

    @cached_property
    def attention_total(self) -> int:
        """Output and lse of all chunks."""
        return sum(self.outs) + sum(self.lses)

    @property
    def longest(self) -> int:
        """Of the longest entry."""
        return max(self.inputs + self.outs + self.lses)


Phase = Literal["forward", "loss", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward")
# What a row of the table of device memory is of: arithmetic goes by this, and never by the words of the row.
RowKind = Literal["entry", "hidden", "resident_kv", "activations", "checkpoints", "streamed_kv", "logits"]

# Activations that one replayed chunk keeps at its peak, in elements a token: multiples of the hidden and of the
# intermediate size, for MLPs with a gate and for plain ones; then the same over Liger's kernels. Measured in bfloat16
# with LoRA on every linear.
GATED_COPIES, PLAIN_COPIES = (14.5, 5.0), (11.0, 4.0)
FUSED_GATED_COPIES, FUSED_PLAIN_COPIES = (5.0, 4.0), (6.5, 4.0)
# The same in attention's backward, which is the peak where the MLP is narrow: multiples of the hidden size, of all
# query heads and of all key and value heads. One model, 32 plain heads and every weight trained, held 17.4 hidden
# sizes; the three shares are by counting tensors.
ATTENTION_COPIES = (3.0, 7.0, 3.7)
# On the device of what a chunk reads from elsewhere: its own input and attention output, and three reads ahead.
CHECKPOINTS_UNDER_WAY = 5
# Of streamed K, V, dK, dV: the diagonal, the chunk at hand, the one that comes; no more than there are.
STREAMED_SETS = 3
# Bytes a logit: as they are, in fp32, and the gradients of both; in the kernel as they are and their gradient alone.
LOGIT_BYTES, FUSED_LOGIT_BYTES = 12, 4


@dataclass(frozen=True)
class ModelSizes:
    """What the arithmetic needs to know of a model.

    Attributes:
        layers: decoder layers.
        hidden: hidden size D.
        intermediate: width of the MLP; of the experts that one token visits together; where layers differ, the
            largest, by which bytes are right and operations are counted as if every layer had it.
        q_heads, kv_heads, head_dim: attention's N, G, H.
        rotary_dim: elements of cos and sin a token.
        layer_parameters: all parameters of one layer.
    """

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    layer_parameters: int

    @property
    def gated(self) -> bool:
        """Whether the MLP has three matrices (a gate), told from the number of weights."""
        attention = 2 * self.hidden * (self.q_heads + self.kv_heads) * self.head_dim
        return self.layer_parameters - attention > 2.5 * self.hidden * self.intermediate

    @property
    def linear_weights(self) -> int:
        """Weights of the matrices of one layer that a token meets: what a strict count of operations multiplies.

        The base model's: no adapters, norms or biases; of experts, those that one token visits.
        """
        attention = 2 * self.hidden * (self.q_heads + self.kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @classmethod
    def of(cls, config: Any, *, layers: int, layer_parameters: int) -> ModelSizes:
        """Read off a transformers text configuration.

        Raises:
            LayersDiffer: its layers differ in what is one number here; `by_layer.why_no_sizes` says so beforehand.
        """
        q_heads, kv_heads, head_dim = attention_sizes(config)
        hidden = one_value(config, "hidden_size")
        experts = largest(config, "num_experts_per_tok") or 1
        width = largest(config, "moe_intermediate_size") if experts > 1 else None
        width = width or largest(config, "intermediate_size") or 4 * hidden
        # Experts that every token visits beside the chosen ones: of a width of their own, or more of the same.
        shared = largest(config, "shared_expert_intermediate_size") if experts > 1 else None
        shared = shared or (largest(config, "n_shared_experts") or 0) * width
        partial = [(rope or {}).get("partial_rotary_factor") or 1.0 for rope in by_layer(config, "rope_parameters")]
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=experts * width + shared,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * max(partial)),
            layer_parameters=layer_parameters,
        )


@dataclass(frozen=True)
class DeviceItem:
    """One line of the table of device memory.

    Attributes:
        kind: what arithmetic knows it by.
        name: what people read of it.
        phases: when it is there.
        nbytes: its size on this rank.
        grows: whether it grows with the sequence, not with the chunk.
    """

    kind: RowKind
    name: str
    phases: tuple[Phase, ...]
    nbytes: int
    grows: bool


@dataclass(frozen=True)
class StepSizes:
    """One step of a model.

    Attributes:
        model: the model.
        plan: the sequence and its chunks.
        batch: sequences.
        element_bytes: bytes of an element of hidden states.
        attention_bytes: bytes of an element of q, k, v; fewer under autocast.
        loss_tokens: tokens whose logits exist at a time.
        vocabulary: logits a token.
        fused: whether a GPU runs Liger's kernels in the layers.
    """

    model: ModelSizes
    plan: ChunkPlan
    batch: int = 1
    element_bytes: int = 2
    attention_bytes: int = 2
    loss_tokens: int = 0
    vocabulary: int = 0
    fused: bool = False

    @property
    def _ranks(self) -> int:
        return self.plan.sp_size

    @property
    def _sum_bytes(self) -> int:
        """Of an element of a sum over chunks: fp32, or float64."""
        return max(4, self.attention_bytes)

    @property
    def unit(self) -> int:
        """Bytes of a rank's hidden states."""
        return self.batch * self.plan.n_tokens // self._ranks * self.model.hidden * self.element_bytes

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a rank, repeated where there are fewer than ranks."""
        return math.lcm(self.model.kv_heads, self._ranks) // self._ranks

    def layer_bytes(self) -> LayerBytes:
        """What a layer would keep, by chunk."""
        m, heads = self.model, self.model.q_heads // self._ranks
        tokens = [self.batch * (chunk.stop - chunk.start) for chunk in self.plan.chunks]
        return LayerBytes(
            inputs=tuple(n // self._ranks * m.hidden * self.element_bytes for n in tokens),
            outs=tuple(n * heads * m.head_dim * self.attention_bytes for n in tokens),
            lses=tuple(n * heads * self._sum_bytes for n in tokens),
        )

    def kv_bytes(self, device_budget: int) -> KVBytes:
        """K and V by chunk, with as many chunks on the device as the budget holds, in either pass."""
        width = self.kv_heads * self.model.head_dim
        tokens = [self.batch * (chunk.stop - chunk.start) for chunk in self.plan.chunks]
        parts = tuple(n * width * self.attention_bytes for n in tokens)
        grads = tuple(n * width * self._sum_bytes for n in tokens)
        both = [part + grad for part, grad in zip(parts, grads, strict=True)]
        return KVBytes(parts, grads, _holds(parts, device_budget), _holds(both, device_budget))

    def attention_over_rest(self) -> float:
        """Operations of a layer's causal attention forward over those of all its linears."""
        attention = 2 * self.plan.n_tokens * self.model.q_heads * self.model.head_dim
        return attention / (2 * max(1, self.model.layer_parameters))

    def device_rows(self, kv: KVBytes) -> Iterator[DeviceItem]:
        """The table: what lies on the device beside weights, optimizer and checkpoints, and when."""
        unit = self.unit
        forward, backward = kv.forward_resident, kv.backward_resident
        yield from self._entry_rows()
        yield DeviceItem("hidden", "a layer's input and output", ("forward",), 2 * unit, True)
        yield DeviceItem(
            "resident_kv", "K, V of one layer, resident chunks", ("forward",), 2 * sum(kv.parts[:forward]), True
        )
        yield DeviceItem("hidden", "last hidden states, normed, and their gradient", ("loss",), 3 * unit, True)
        yield DeviceItem("hidden", "gradients of a layer's output and input", ("backward",), 2 * unit, True)
        yield DeviceItem(
            "resident_kv", "K, V of one layer, resident chunks", ("backward",), 2 * sum(kv.parts[:backward]), True
        )
        yield DeviceItem(
            "resident_kv", "dK, dV of one layer, resident chunks", ("backward",), 2 * sum(kv.grads[:backward]), True
        )
        yield from self._chunk_rows(kv)

    def _entry_rows(self) -> Iterator[DeviceItem]:
        tokens = self.batch * self.plan.n_tokens // self._ranks
        cos_sin = 2 * tokens // self.batch * self.model.rotary_dim * self.element_bytes
        yield DeviceItem("entry", "input ids, labels, shifted labels, positions", PHASES, 4 * 8 * tokens, True)
        yield DeviceItem("entry", "cos, sin", PHASES, cos_sin, True)
        yield DeviceItem("entry", "embeddings, held by the model's own forward", ("forward",), self.unit, True)

    @property
    def entry_bytes(self) -> int:
        """Of the table, what is on the device when the first layer begins."""
        return sum(row.nbytes for row in self._entry_rows())

    def _chunk_rows(self, kv: KVBytes) -> Iterator[DeviceItem]:
        m, chunk = self.model, self.plan.chunks[0]
        tokens = self.batch * (chunk.rank_stop - chunk.rank_start)
        unit = tokens * m.hidden * self.element_bytes
        replay = max(self._mlp_bytes(tokens), self._attention_bytes(tokens))
        streamed = 2 * (kv.parts[0] + kv.grads[0]) if kv.backward_resident < len(kv.parts) else 0
        yield DeviceItem("activations", "a chunk's activations", ("forward",), replay // 2, False)
        yield DeviceItem("activations", "a replayed chunk's activations", ("backward",), replay, False)
        yield DeviceItem("checkpoints", "checkpoints under way", ("backward",), CHECKPOINTS_UNDER_WAY * unit, False)
        sets = min(STREAMED_SETS, len(kv.parts))
        yield DeviceItem("streamed_kv", "streamed K, V, dK, dV under way", ("backward",), sets * streamed, False)
        logit = FUSED_LOGIT_BYTES if self.fused else LOGIT_BYTES
        yield DeviceItem(
            "logits", "a loss chunk's logits", ("loss",), logit * self.loss_tokens * self.vocabulary, False
        )

    def _mlp_bytes(self, tokens: int) -> int:
        m = self.model
        gated, plain = (FUSED_GATED_COPIES, FUSED_PLAIN_COPIES) if self.fused else (GATED_COPIES, PLAIN_COPIES)
        hidden, intermediate = gated if m.gated else plain
        return int(tokens * (hidden * m.hidden + intermediate * m.intermediate) * self.element_bytes)

    def _attention_bytes(self, tokens: int) -> int:
        m, (hidden, query, kv) = self.model, ATTENTION_COPIES
        heads = query * m.q_heads + 2 * kv * self.kv_heads * self._ranks
        return int(tokens * (hidden * m.hidden * self.element_bytes + heads * m.head_dim * self.attention_bytes))

    def working_bytes(self, kv: KVBytes, *, checkpoints_elsewhere: bool = True, resident: bool = False) -> int:
        """The most that the table's rows take together in any phase.

        Args:
            checkpoints_elsewhere: whether checkpoints come from the host or a file, so that some are under way.
            resident: count resident K, V, dK, dV too.
        """
        return max(
            self.phase_bytes(kv, phase, checkpoints_elsewhere=checkpoints_elsewhere, resident=resident)
            for phase in PHASES
        )

    def phase_bytes(
        self, kv: KVBytes, phase: Phase, *, checkpoints_elsewhere: bool = True, resident: bool = False
    ) -> int:
        """What the table's rows take together in one phase; the arguments are those of `working_bytes`."""
        left_out = {"resident_kv": not resident, "checkpoints": not checkpoints_elsewhere}
        rows = (row for row in self.device_rows(kv) if not left_out.get(row.kind, False))
        return sum(row.nbytes for row in rows if phase in row.phases)


def _holds(parts: tuple[int, ...] | list[int], budget: int) -> int:
    """How many of the first parts, each twice, fit in the budget."""
    count, total = 0, 0
    while count < len(parts) and total + 2 * parts[count] <= budget:
        total += 2 * parts[count]
        count += 1
    return count


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one layer's K (as many of V) and of its fp32 gradient, by chunk, and how many chunks the device holds.

    Attributes:
        parts: K of each chunk.
        grads: dK of each chunk.
        forward_resident: chunks on the device in a forward pass, from the first.
        backward_resident: chunks on the device, with their gradients, in a backward pass.
    """

    parts: tuple[int, ...]
    grads: tuple[int, ...]
    forward_resident: int
    backward_resident: int

    @property
    def device_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the device, but for what is under way."""
        backward = sum(self.parts[: self.backward_resident]) + sum(self.grads[: self.backward_resident])
        return 2 * max(sum(self.parts[: self.forward_resident]), backward)

    @property
    def host_bytes(self) -> int:
        """The most that one layer's K, V, dK, dV take on the host."""
        last = len(self.parts) - 1
        forward = sum(self.parts[self.forward_resident : last])
        # The last streamed gradients never leave the device, see `StreamedKV`.
        backward = sum(self.parts[self.backward_resident : last]) + sum(self.grads[self.backward_resident : last - 1])
        return 2 * max(forward, backward)

    @property
    def host_buffer_bytes(self) -> int:
        """Their buffers, in whole pages: those of a backward pass, which serve the forward pass too."""
        last = len(self.parts) - 1
        streamed = self.parts[self.backward_resident : last] + self.grads[self.backward_resident : max(0, last - 1)]
        return 2 * sum(map(page_rounded, streamed))
