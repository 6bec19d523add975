"""What the arithmetic needs to know of a model, read off its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .by_layer import (
    AttentionSizes,
    attention_sizes,
    by_layer,
    is_latent,
    largest,
    latent_weights,
    one_value,
    windows_of,
)


@dataclass(frozen=True)
class StateSize:
    """One state that a recurrent layer hands from chunk to chunk.

    Attributes:
        name: what the layer's cache calls it, with its number: "conv 0", "recurrent 0".
        elements: of one sequence.
        itemsize: bytes of one; 0: as hidden states have.
    """

    name: str
    elements: int
    itemsize: int = 0


@dataclass(frozen=True)
class LayerMix:
    """What one layer of a model with recurrent layers does with its sequence, and with each token.

    Attributes:
        attends: whether it calls attention.
        linear_weights: of its matrices and convolutions, what one token meets; adapters aside.
        states: what it hands from chunk to chunk; () where it carries nothing.
        channels: of its convolutions together.
    """

    attends: bool = True
    linear_weights: int = 0
    states: tuple[StateSize, ...] = ()
    channels: int = 0

    @property
    def scanned(self) -> int:
        """Elements of the states that every token decays, adds to and reads; those of convolutions aside."""
        return sum(state.elements for state in self.states if not state.name.startswith(CONV))

    @property
    def scan_operations(self) -> int:
        """Of one token, forward: two each for the decay, the outer product that is added, and the reading."""
        return SCAN_OPERATIONS * self.scanned


CONV, SCAN_OPERATIONS = "conv", 6


class LinearSize(NamedTuple):
    """A linear of a layer, whose output may be kept for the backward pass; the first product of chosen experts is one.

    Attributes:
        name: the module's, inside its layer; without what an adapter puts around it.
        inputs, outputs: features of a token; of experts those that all give that it visits.
        late: whether the layer calls it after attention.
        captured: whether K and V are made of its output, which backward makes once more for all chunks but the last.
        itemsize: bytes of an element of its output; 0: as q, k and v have.
    """

    name: str
    inputs: int
    outputs: int
    late: bool = False
    captured: bool = False
    itemsize: int = 0

    @property
    def entry(self) -> str:
        """The name of its checkpoint."""
        return f"linear {self.name}"

    def output_bytes(self, attention_bytes: int) -> int:
        """Of a token; `attention_bytes` are those of an element of q, k and v."""
        return self.outputs * (self.itemsize or attention_bytes)


@dataclass(frozen=True)
class ModelSizes:
    """What the arithmetic needs to know of a model.

    Attributes:
        layers: decoder layers.
        hidden: hidden size D.
        intermediate: width of the MLP; of the experts that one token visits together; where layers differ, the
            largest, by which bytes are right and operations are counted as if every layer had it.
        q_heads, kv_heads, head_dim: attention's N, G, and H of queries and keys; where layers differ, the largest.
        rotary_dim: elements of cos and sin a token, of all kinds of layers together.
        layer_parameters: all parameters of one layer.
        value_dim: elements of a head of values; 0: as many as of keys.
        windows: of each layer the keys that a query sees, its own among them, None: all before it; (): of every layer.
        latent_weights: of the projections around attention where keys and values come out of a latent (MLA).
        idle_width: width of all experts of a layer that one token does not visit.
        experts: chosen experts that one token visits; 0: there are none to choose.
        mixes: of each layer what it does; (): every layer attends, and none carries a state.
        heads: of each layer; (): of every layer those above.
        merged: weights of one layer's experts that adapters are merged into, whole, whenever the layer runs.
        whole_weights: of the layer with most, those that are quantised, and dequantised while it runs.
        whole_itemsize: bytes of one of them then; 0: as q, k and v have.
        fetched_bytes: of the layer with most, what comes from the host whenever it runs; 0: weights stay.
        linears: of each layer those whose outputs may be kept, in the order of calls; (): none is known.

    Raises:
        ValueError: there are windows, mixes, heads or linears, but not one for each layer.
    """

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    layer_parameters: int
    value_dim: int = 0
    windows: tuple[int | None, ...] = ()
    latent_weights: int = 0
    idle_width: int = 0
    experts: int = 0
    mixes: tuple[LayerMix, ...] = ()
    heads: tuple[AttentionSizes, ...] = ()
    merged: int = 0
    whole_weights: int = 0
    whole_itemsize: int = 0
    fetched_bytes: int = 0
    linears: tuple[tuple[LinearSize, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("windows", "mixes", "heads", "linears"):
            value = getattr(self, name)
            if value and len(value) != self.layers:
                raise ValueError(
                    f"ModelSizes({name}={value}): one for each of {self.layers} layers is expected, or ()."
                )
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)

    def with_heads(self, heads: Sequence[AttentionSizes]) -> ModelSizes:
        """The same with these heads of each layer, as its attention was seen to have them."""
        largest_of = AttentionSizes(*map(max, zip(*heads, strict=True)))
        return replace(self, **largest_of._asdict(), heads=tuple(heads) if len(set(heads)) > 1 else ())

    def heads_of(self, layer: int) -> AttentionSizes:
        """Heads of a layer's attention."""
        if self.heads:
            return self.heads[layer]
        return AttentionSizes(self.q_heads, self.kv_heads, self.head_dim, self.value_dim)

    def linears_of(self, layer: int) -> tuple[LinearSize, ...]:
        """Those of a layer whose outputs may be kept."""
        return self.linears[layer] if self.linears else ()

    def window(self, layer: int) -> int | None:
        """The keys that a query sees in a layer; None: all before it."""
        return self.windows[layer] if self.windows else None

    def windows_at(self, n_tokens: int) -> tuple[int | None, ...]:
        """Of each layer; None too where a sequence of so many tokens does not reach its window."""
        windows = self.windows or (None,) * self.layers
        return tuple(None if window is None or window >= n_tokens else window for window in windows)

    def mix(self, layer: int) -> LayerMix:
        """What a layer does."""
        return self.mixes[layer] if self.mixes else LayerMix(linear_weights=self.linear_weights)

    @property
    def all_mixes(self) -> tuple[LayerMix, ...]:
        """Of each layer."""
        return self.mixes or (self.mix(0),) * self.layers

    def attention_forward(self, pairs: float) -> float:
        """Operations of one layer's attention, forward, on so many pairs of a query and a key: two products."""
        return 2.0 * pairs * self.q_heads * (self.head_dim + self.value_dim)

    def attention_backward(self, pairs: float) -> float:
        """The same of its backward kernel: five products, as it makes the scores again."""
        return 2.0 * pairs * self.q_heads * (3 * self.head_dim + 2 * self.value_dim)

    @property
    def _attention_weights(self) -> int:
        """Of one layer; where they differ, of the mean."""
        if self.latent_weights:
            return self.latent_weights
        heads = [self.heads_of(layer) for layer in range(self.layers if self.heads else 1)]
        return self.hidden * sum((h.q_heads + h.kv_heads) * (h.head_dim + h.value_dim) for h in heads) // len(heads)

    @property
    def gated(self) -> bool:
        """Whether the MLP has three matrices (a gate), told from the number of weights."""
        width = self.intermediate + self.idle_width
        return self.layer_parameters - self._attention_weights > 2.5 * self.hidden * width

    @property
    def linear_weights(self) -> int:
        """Weights of the matrices of one layer that a token meets: what a strict count of operations multiplies.

        The base model's: no adapters, norms or biases; of experts, those that one token visits.
        """
        return self._attention_weights + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def met_parameters(self) -> int:
        """All parameters of one layer, adapters too, but for those of experts that a token does not visit."""
        return self.layer_parameters - (3 if self.gated else 2) * self.hidden * self.idle_width

    @classmethod
    def of(cls, config: Any, *, layers: int, layer_parameters: int) -> ModelSizes:
        """Read off a transformers text configuration.

        Raises:
            LayersDiffer: its layers differ in what is one number here; `by_layer.why_no_sizes` says so beforehand.
        """
        heads, hidden = attention_sizes(config), one_value(config, "hidden_size")
        width, visited, others = _experts(config)
        width = width or largest(config, "intermediate_size") or 4 * hidden
        # Experts that every token visits beside the chosen ones: of a width of their own, or more of the same.
        shared = largest(config, "shared_expert_intermediate_size") if visited > 1 else None
        shared = shared or (largest(config, "n_shared_experts") or 0) * width
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=visited * width + shared,
            q_heads=heads.q_heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            rotary_dim=_rotary_dim(config, heads.head_dim),
            layer_parameters=layer_parameters,
            value_dim=heads.value_dim,
            windows=_windows(config, layers),
            latent_weights=latent_weights(config) if is_latent(config) else 0,
            idle_width=others * width,
            experts=visited if visited > 1 else 0,
        )


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """One for each layer of the model, whatever the configuration says of their number; () where none has one."""
    windows = (*windows_of(config), *(None,) * layers)[:layers]
    return windows if any(windows) else ()


def _experts(config: Any) -> tuple[int | None, int, int]:
    """(their width if it is one of their own, how many one token visits, how many it does not)."""
    visited = largest(config, "num_experts_per_tok") or 1
    width = largest(config, "moe_intermediate_size") if visited > 1 else None
    count = max(largest(config, name) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return width, visited, max(0, count - visited) if visited > 1 else 0


def _rotary_dim(config: Any, head_dim: int) -> int:
    """Of cos and sin; each kind of layers may have its own."""
    if is_latent(config):
        return int(one_value(config, "qk_rope_head_dim"))
    ropes = [rope or {} for rope in by_layer(config, "rope_parameters")]
    partial = max(rope.get("partial_rotary_factor") or 1.0 for rope in ropes)
    kinds = set(getattr(config, "layer_types", None) or ()) & {kind for rope in ropes for kind in rope}
    return int(head_dim * partial) * max(1, len(kinds))
