"""How many bytes a training step needs: what layers would keep, K and V, and what grows on the GPU.

Sizes are those of one rank. Letters: B batch, S tokens of the sequence, P ranks that share it, D hidden size, N query
heads, G key/value heads, H head dimension of queries and keys.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ..layout import ChunkPlan, Documents, first_key, seen_pairs
from .kv_bytes import KVBytes, holds
from .layer_bytes import LayerBytes, LinearBytes
from .model_sizes import CONV, LayerMix, ModelSizes

Phase = Literal["forward", "loss", "backward"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward")
# What a row of the table of device memory is of: arithmetic goes by this, and never by the words of the row.
RowKind = Literal[
    "entry", "hidden", "resident_kv", "ring_kv", "activations", "checkpoints", "streamed_kv", "logits", "weights"
]

# Activations that one replayed chunk keeps at its peak, in elements a token: multiples of the hidden and of the
# intermediate size, for MLPs with a gate and for plain ones; then the same over Liger's kernels. Measured in bfloat16
# with LoRA on every linear.
GATED_COPIES, PLAIN_COPIES = (14.5, 5.0), (11.0, 4.0)
FUSED_GATED_COPIES, FUSED_PLAIN_COPIES = (5.0, 4.0), (6.5, 4.0)
# The same where a token visits experts: of the hidden size for each of them, and of their widths together. Then where
# they run as one operation, by counting its tensors. The first were measured with gpt-oss-20b, whose experts have
# biases and a gate of many steps; others take less.
EXPERT_COPIES, FUSED_EXPERT_COPIES = (4.0, 8.5), (1.0, 5.0)
# Of experts' weights that adapters are merged into: the sum, its gradient, and what autograd makes of it in parts. By
# counting with eager experts on a CPU.
MERGED_COPIES = 4
# The same in attention's backward, which is the peak where the MLP is narrow: multiples of the hidden size, of all
# query heads and of all key and value heads. One model, 32 plain heads and every weight trained, held 17.4 hidden
# sizes; the three shares are by counting tensors.
ATTENTION_COPIES = (3.0, 7.0, 3.7)
# A dense layer's forward pass beside one that waits, which is then the peak: multiples of the hidden size and of the
# intermediate size, gated or not. Counted on an H200 in DPO's reference; others were within half a replay.
FORWARD_GATED_COPIES, FORWARD_PLAIN_COPIES = (4.0, 3.0), (4.0, 2.0)
# What a recurrent mixer keeps beside its layer's MLP, since one backward pass goes through both: multiples of the
# channels of its convolutions. Qwen3.5-9B over the kernels of flash-linear-attention held 4.4 of them.
RECURRENT_COPIES = 5.0
# On the device of what a chunk reads from elsewhere: its own input and attention output, and three reads ahead.
CHECKPOINTS_UNDER_WAY = 5
# Of streamed K, V, dK, dV: the diagonal, the chunk at hand, the one that comes; no more than there are.
STREAMED_SETS = 3
# Bytes a logit: as they are, in fp32, and the gradients of both; in the kernel as they are and their gradient alone.
LOGIT_BYTES, FUSED_LOGIT_BYTES = 12, 4


@dataclass(frozen=True)
class DeviceItem:
    """One line of the table of device memory.

    Attributes:
        kind: what arithmetic knows it by.
        name: what people read of it.
        phases: when it is there.
        nbytes: its size on this rank.
    """

    kind: RowKind
    name: str
    phases: tuple[Phase, ...]
    nbytes: int


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
        score_bytes: of attention's scores, where plain PyTorch computes it.
        fused_experts: whether chosen experts run as one operation.
        awaited: whether it may run while another one of its size awaits its backward pass, as a reference does.
        documents: of a packed row: operations are counted by them, while memory is planned for one document, which
            takes the most; so steps that differ in them alone are planned once.
    """

    model: ModelSizes
    plan: ChunkPlan
    batch: int = 1
    element_bytes: int = 2
    attention_bytes: int = 2
    loss_tokens: int = 0
    vocabulary: int = 0
    fused: bool = False
    score_bytes: int = 0
    fused_experts: bool = False
    awaited: bool = False
    documents: Documents | None = field(default=None, compare=False)

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
        return self._of_rank(self.model.kv_heads)

    def _of_rank(self, kv_heads: int) -> int:
        return math.lcm(kv_heads, self._ranks) // self._ranks

    def _kv_widths(self, layer: int) -> tuple[int, int]:
        """Elements of a token's K and of its V in a layer of the model, on a rank."""
        heads = self.model.heads_of(layer)
        return self._of_rank(heads.kv_heads) * heads.head_dim, self._of_rank(heads.kv_heads) * heads.value_dim

    def layer_bytes(self, layers: int | None = None) -> LayerBytes:
        """What a layer would keep, by chunk.

        Args:
            layers: those of the pass, the last ones of the model; None: all.
        """
        m, heads = self.model, self.model.q_heads // self._ranks
        tokens = [self.batch * (chunk.stop - chunk.start) for chunk in self.plan.chunks]
        return LayerBytes(
            inputs=tuple(n // self._ranks * m.hidden * self.element_bytes for n in tokens),
            outs=tuple(n * heads * m.value_dim * self.attention_bytes for n in tokens),
            lses=tuple(n * heads * self._sum_bytes for n in tokens),
            linears=self._linear_bytes(m.layers if layers is None else layers, tokens),
            **self._layers_own(m.layers if layers is None else layers),
        )

    def _layers_own(self, layers: int) -> dict[str, Any]:
        """Of each of the last so many layers, whether it attends, and its states; nothing where all attend alone."""
        mixes = self.mixes_of_last(layers)
        if not any(not mix.attends or mix.states for mix in mixes):
            return {}
        # Of a scan a rank has the states of its own heads; inputs of convolutions are the same on all.
        states = (
            {
                each.name: self.batch
                * (each.elements if each.name.startswith(CONV) else each.elements // self._ranks)
                * (each.itemsize or self.attention_bytes)
                for each in mix.states
            }
            for mix in mixes
        )
        return {"attends": tuple(mix.attends for mix in mixes), "states": tuple(map(MappingProxyType, states))}

    def _linear_bytes(self, layers: int, tokens: list[int]) -> tuple[tuple[LinearBytes, ...], ...]:
        kinds = {
            kind: tuple(
                LinearBytes(
                    each.entry,
                    each.late,
                    tuple(n // self._ranks * each.output_bytes(self.attention_bytes) for n in tokens),
                )
                for each in kind
            )
            for kind in set(self.model.linears)
        }
        return tuple(kinds[kind] for kind in self.model.linears[-layers:])

    def mixes_of_last(self, layers: int) -> tuple[LayerMix, ...]:
        """What each of the last so many layers of the model does."""
        return self.model.all_mixes[self.model.layers - layers :]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer of the model the keys that a query sees; None: all before it, in a sequence of this length."""
        return self.model.windows_at(self.plan.n_tokens)

    def windows_of_last(self, layers: int) -> tuple[int | None, ...]:
        """The same of a pass with so many layers: the last ones of the model."""
        return self.windows[self.model.layers - layers :]

    def kv_bytes(self, device_budget: int, layers: int | None = None) -> KVBytes:
        """K and V by chunk, with as many chunks on the device as the budget holds, in either pass.

        Args:
            layers: those of the pass, the last ones of the model; None: all.
        """
        m, tokens = self.model, [self.batch * (chunk.stop - chunk.start) for chunk in self.plan.chunks]
        layers = m.layers if layers is None else layers
        windows, mixes = self.windows_of_last(layers), self.mixes_of_last(layers)
        widths = [self._kv_widths(layer) for layer in range(m.layers - layers, m.layers)]
        kinds = {(window, w) for window, w, mix in zip(windows, widths, mixes, strict=True) if mix.attends}
        # Of layers that have K and V of the sequence; where there is none, nobody asks.
        keys, values = map(max, zip(*([w for window, w in kinds if window is None] or widths), strict=True))
        reached = {(window, sum(w)) for window, w in kinds if window is not None}
        # Layers without attention have no K and V at all: a ring of nothing.
        ringed = tuple(window is not None or not mix.attends for window, mix in zip(windows, mixes, strict=True))
        kv = KVBytes(
            parts=tuple(n * keys * self.attention_bytes for n in tokens),
            grads=tuple(n * keys * self._sum_bytes for n in tokens),
            forward_resident=len(tokens),
            backward_resident=len(tokens),
            value_parts=tuple(n * values * self.attention_bytes for n in tokens),
            value_grads=tuple(n * values * self._sum_bytes for n in tokens),
            windowed=ringed if any(ringed) else (),
            forward_ring=max((self._ring_bytes(*kind, backward=False) for kind in reached), default=0),
            backward_ring=max((self._ring_bytes(*kind, backward=True) for kind in reached), default=0),
        )
        return kv if kv.all_windowed else holds(kv, device_budget)

    def _ring_bytes(self, window: int, width: int, *, backward: bool) -> int:
        """The most that a layer with such a window has of K and V on the device in one pass; on the host it has none.

        Those of the chunks that a row reads, in backward with their gradients, and the keys in reach side by side, as
        the kernel reads them: in forward a row that reads its own chunk alone has them so already.

        Args:
            width: elements of a token's K and V together.
        """
        held_bytes, most = self.attention_bytes + self._sum_bytes * backward, 0
        for chunk in self.plan.chunks:
            first = first_key(chunk.start, window)
            held = chunk.stop - first // self.plan.chunk_tokens * self.plan.chunk_tokens
            copied = chunk.stop - first if backward or held > chunk.stop - chunk.start else 0
            most = max(most, held * held_bytes + copied * self.attention_bytes)
        return self.batch * width * most

    def attention_costs(self, layers: int) -> tuple[float, ...]:
        """Of the last so many layers, operations of attention forward over those of all the layer's linears."""
        n_tokens, linear = self.plan.n_tokens, 2 * max(1, self.model.layer_parameters)
        windows = self.windows_of_last(layers)
        costs = {
            window: self.model.attention_forward(seen_pairs(0, n_tokens, window)) / n_tokens / linear
            for window in set(windows)
        }
        mixes = self.mixes_of_last(layers)
        return tuple(costs[window] * mix.attends for window, mix in zip(windows, mixes, strict=True))

    def device_rows(self, kv: KVBytes) -> Iterator[DeviceItem]:
        """The table: what lies on the device beside weights, optimizer and checkpoints, and when."""
        unit, resident = self.unit, kv.resident_parts
        yield from self._entry_rows()
        yield DeviceItem("hidden", "a layer's input and output", ("forward",), 2 * unit)
        yield DeviceItem("resident_kv", "K, V of one layer, resident chunks", ("forward",), resident.forward)
        yield DeviceItem("hidden", "last hidden states, normed, and their gradient", ("loss",), 3 * unit)
        if self.awaited:  # those three with its cos, sin and ids; in a loss between, normed ones are there beside them
            yield DeviceItem("hidden", "kept by the pass that waits", ("forward",), 2 * unit + self.entry_bytes)
            yield DeviceItem("hidden", "kept by the pass that waits, and normed", ("loss",), self.entry_bytes)
        yield DeviceItem("hidden", "gradients of a layer's output and input", ("backward",), 2 * unit)
        yield DeviceItem("resident_kv", "K, V of one layer, resident chunks", ("backward",), resident.backward)
        yield DeviceItem("resident_kv", "dK, dV of one layer, resident chunks", ("backward",), resident.grads)
        if kv.forward_ring:
            yield DeviceItem("ring_kv", "K, V in reach of a window", ("forward",), kv.forward_ring)
            yield DeviceItem("ring_kv", "K, V, dK, dV in reach of a window", ("backward",), kv.backward_ring)
        if fetched := self.model.fetched_bytes:  # the layer that runs and the next one; the last waits for backward
            yield DeviceItem("weights", "weights of two layers, fetched", ("forward", "backward"), 2 * fetched)
            yield DeviceItem("weights", "weights of the last layer", ("loss",), fetched)
        if self.whole_bytes:
            of_layers: tuple[Phase, ...] = ("forward", "backward")
            yield DeviceItem("weights", "a layer's weights, dequantised", of_layers, self.whole_bytes)
        yield from self._chunk_rows(kv)

    @property
    def whole_bytes(self) -> int:
        """Of one layer's weights that are whole while it runs, beside where they are kept in another form."""
        return self.model.whole_weights * (self.model.whole_itemsize or self.attention_bytes)

    def _entry_rows(self) -> Iterator[DeviceItem]:
        tokens = self.batch * self.plan.n_tokens // self._ranks
        cos_sin = 2 * tokens // self.batch * self.model.rotary_dim * self.element_bytes
        yield DeviceItem("entry", "input ids, labels, shifted labels, positions", PHASES, 4 * 8 * tokens)
        yield DeviceItem("entry", "cos, sin", PHASES, cos_sin)
        yield DeviceItem("entry", "embeddings, held by the model's own forward", ("forward",), self.unit)

    @property
    def entry_bytes(self) -> int:
        """Of the table, what is on the device when the first layer begins."""
        return sum(row.nbytes for row in self._entry_rows())

    def _chunk_rows(self, kv: KVBytes) -> Iterator[DeviceItem]:
        m, chunk = self.model, self.plan.chunks[0]
        tokens = self.batch * (chunk.rank_stop - chunk.rank_start)
        unit = tokens * m.hidden * self.element_bytes
        replay = max(self._mlp_bytes(tokens) + self._recurrent_bytes(tokens), self._attention_bytes(tokens))
        streamed = sum(kv.both_parts[0] + kv.both_grads[0]) if kv.backward_resident < len(kv.parts) else 0
        yield DeviceItem("activations", "a chunk's activations", ("forward",), self._forward_bytes(tokens, replay))
        yield DeviceItem("activations", "a replayed chunk's activations", ("backward",), replay)
        yield DeviceItem("checkpoints", "checkpoints under way", ("backward",), CHECKPOINTS_UNDER_WAY * unit)
        sets = min(STREAMED_SETS, len(kv.parts))
        yield DeviceItem("streamed_kv", "streamed K, V, dK, dV under way", ("backward",), sets * streamed)
        logit = FUSED_LOGIT_BYTES if self.fused else LOGIT_BYTES
        yield DeviceItem("logits", "a loss chunk's logits", ("loss",), logit * self.loss_tokens * self.vocabulary)

    def _forward_bytes(self, tokens: int, replay: int) -> int:
        m, (hidden, intermediate) = self.model, FORWARD_GATED_COPIES if self.model.gated else FORWARD_PLAIN_COPIES
        if not self.awaited or m.experts:
            return replay // 2
        return max(replay // 2, int(tokens * (hidden * m.hidden + intermediate * m.intermediate) * self.element_bytes))

    def _mlp_bytes(self, tokens: int) -> int:
        m = self.model
        gated, plain = (FUSED_GATED_COPIES, FUSED_PLAIN_COPIES) if self.fused else (GATED_COPIES, PLAIN_COPIES)
        hidden, intermediate = gated if m.gated else plain
        if m.experts:
            row, intermediate = FUSED_EXPERT_COPIES if self.fused_experts else EXPERT_COPIES
            hidden += m.experts * row
        activations = int(tokens * (hidden * m.hidden + intermediate * m.intermediate) * self.element_bytes)
        return activations + MERGED_COPIES * m.merged * self.element_bytes

    def _attention_bytes(self, tokens: int) -> int:
        m, (hidden, query, kv) = self.model, ATTENTION_COPIES
        width = max(m.head_dim, m.value_dim, 1)  # of queries; K and V of each its own
        heads = query * m.q_heads + (m.head_dim + m.value_dim) / width * kv * self.kv_heads * self._ranks
        tensors = int(tokens * (hidden * m.hidden * self.element_bytes + heads * width * self.attention_bytes))
        return tensors + self.score_bytes

    def _recurrent_bytes(self, tokens: int) -> int:
        """Of the layer with most channels; its states at one border are there twice, with their gradients."""
        widest = max(mix.channels for mix in self.model.all_mixes)
        states = max((sum(layer.values()) for layer in self.layer_bytes().states), default=0)
        return int(tokens * RECURRENT_COPIES * widest * self.element_bytes) + 4 * states

    def working_bytes(self, kv: KVBytes, *, checkpoints_elsewhere: bool = True, resident: bool = False) -> int:
        """The most that the table's rows take together in any phase.

        Args:
            checkpoints_elsewhere: whether checkpoints come from the host or a file, so that some are under way.
            resident: count K, V, dK, dV that stay on the device too: `KVBytes.device_bytes`.
        """
        return max(
            self.phase_bytes(kv, phase, checkpoints_elsewhere=checkpoints_elsewhere, resident=resident)
            for phase in PHASES
        )

    def phase_bytes(
        self, kv: KVBytes, phase: Phase, *, checkpoints_elsewhere: bool = True, resident: bool = False
    ) -> int:
        """What the table's rows take together in one phase; the arguments are those of `working_bytes`."""
        sums: Counter[RowKind] = Counter()
        for row in self.device_rows(kv):
            sums[row.kind] += row.nbytes * (phase in row.phases)
        # One layer runs at a time: one with a window, or one without.
        in_layer = max(sums.pop("resident_kv"), sums.pop("ring_kv", 0))
        if not checkpoints_elsewhere:
            del sums["checkpoints"]
        return sums.total() + in_layer * resident
