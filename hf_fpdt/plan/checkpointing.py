"""What one pass keeps of its layers for the backward pass: the rule of checkpoints, in whole numbers; no torch.

For each layer the store keeps its input or not, and its attention output (with lse) or not. A missing attention output
costs one attention forward in backward. A missing input is rebuilt from the nearest kept input below: token by token
alone through layers whose attention output is there, by whole forward passes through the others; what a rebuild makes
stays until its layer is done. Layers from one kept input up to the next are a SEGMENT. Where there is room beside
these, outputs of linears are kept too, by layer and chunk, and are not computed again (see `linears`).

Backward frees the upper layers first, and what they free has room for rebuilding below. So segments GROW downwards:
with attention outputs kept they may have 1, 3, 7, 15, … layers, with none 1, 1, 2, 2, 3, 3, …, and nothing is ever
needed beyond what the forward pass left. Segments of one size need their own size on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .layer_bytes import LayerBytes
from .tiers import Budgets, ForwardOrder


class KeptChunks(NamedTuple):
    """The chunks of which a linear's output is kept: so many of the last ones.

    Attributes:
        kept: chunks.
        on_device: of these, those on the device, last ones too; the others lie on the host.
    """

    kept: int = 0
    on_device: int = 0

    def tier(self, chunk: int, chunks: int) -> Literal["device", "host"] | None:
        """Where a chunk's lies; None where it is not kept."""
        if chunk < chunks - self.kept:
            return None
        return "device" if chunk >= chunks - self.on_device else "host"


@dataclass(frozen=True)
class KeptLayers:
    """Which layers keep what, from the lowest layer with a backward pass (0) upwards.

    Attributes:
        inputs: whether a layer's input is kept; the lowest one's always is.
        attentions: whether a layer's attention output and lse are; True of a layer without attention, which has none
            to run again.
        without: layers without attention.
        linears: of each layer, of each of its linears, the chunks whose output is kept; (): of none.
    """

    inputs: tuple[bool, ...]
    attentions: tuple[bool, ...]
    without: int = 0
    linears: tuple[tuple[KeptChunks, ...], ...] = ()

    def base(self, layer: int) -> int:
        """The layer from whose input that of `layer` is rebuilt: itself where it is kept."""
        while not self.inputs[layer]:
            layer -= 1
        return layer

    def linears_of(self, layer: int) -> tuple[KeptChunks, ...]:
        """Of each linear of a layer the chunks whose output is kept."""
        return self.linears[layer] if self.linears else ()

    @property
    def layers(self) -> int:
        """Layers with a backward pass."""
        return len(self.inputs)

    @property
    def rebuilt(self) -> int:
        """Layers whose forward pass is run again for the sake of the input above."""
        return self.inputs.count(False)

    @property
    def attention_reruns(self) -> int:
        """Layers whose attention is run again."""
        return self.attentions.count(False)

    @property
    def rebuilt_attentions(self) -> int:
        """Layers run again for the sake of the input above whose attention runs again with them."""
        return sum(not above and not out for above, out in zip(self.inputs[1:], self.attentions[:-1], strict=True))

    def __str__(self) -> str:
        inputs, outs = self.inputs.count(True), self.attentions.count(True) - self.without
        return f"{inputs} inputs and {outs} attention outputs of {self.layers} layers"


def forward_bytes(kept: KeptLayers, sizes: LayerBytes) -> int:
    """What the store holds when the forward pass ends."""
    return _ordered_bytes(kept, sizes) + linear_bytes(kept, sizes).total


def _ordered_bytes(kept: KeptLayers, sizes: LayerBytes) -> int:
    """The same without outputs of linears."""
    attentions = _attention_bytes(kept.attentions, range(kept.layers), sizes)
    return kept.inputs.count(True) * sizes.input_total + attentions + sizes.all_states


def linear_bytes(kept: KeptLayers, sizes: LayerBytes) -> Budgets:
    """What kept outputs of linears take of each tier."""
    each = [_linear_bytes_of(kept, sizes, layer) for layer in range(len(kept.linears))]
    return Budgets(sum(layer.device for layer in each), sum(layer.host for layer in each))


def _linear_bytes_of(kept: KeptLayers, sizes: LayerBytes, layer: int) -> Budgets:
    device, every = 0, 0
    for chunks, linear in zip(kept.linears_of(layer), sizes.linears_of(layer), strict=False):
        count = len(linear.chunks)
        # Ranks with shorter sequences keep as many chunks as the longest, or all that they have.
        every += sum(linear.chunks[max(0, count - chunks.kept) :])
        device += sum(linear.chunks[max(0, count - chunks.on_device) :])
    return Budgets(device, every - device)


def forward_order(kept: KeptLayers, sizes: LayerBytes, budgets: Budgets) -> ForwardOrder:
    """Where a forward pass puts inputs, attention outputs and states: what linears take is set aside for them."""
    linears = linear_bytes(kept, sizes)
    left = Budgets(budgets.device - linears.device, budgets.host - linears.host, budgets.disk)
    return ForwardOrder(_ordered_bytes(kept, sizes), left)


def _attention_bytes(kept: Sequence[bool], layers: Iterable[int], sizes: LayerBytes) -> int:
    """Attention outputs of those of `layers` that keep theirs."""
    return sum(sizes.attention_of(layer) for layer in layers if kept[layer])


def peak_bytes(kept: KeptLayers, sizes: LayerBytes) -> int:
    """The most that the store holds at any moment of the step."""
    held = peak = forward_bytes(kept, sizes)
    for layer in reversed(range(kept.layers)):
        if not kept.inputs[layer] and kept.inputs[layer + 1 : layer + 2] != (False,):
            held += rebuild_bytes(kept.attentions, kept.base(layer), layer, sizes)
            peak = max(peak, held)
        # The layer below a rebuilt input was run again, attention too where its output had not been kept.
        rebuilt = layer + 1 < kept.layers and not kept.inputs[layer + 1]
        held -= sizes.input_total + sizes.attention_of(layer) * (kept.attentions[layer] or rebuilt)
        held -= sizes.state_total(layer) + _linear_bytes_of(kept, sizes, layer).total
    return peak


def rebuild_bytes(attentions: Sequence[bool], base: int, layer: int, sizes: LayerBytes) -> int:
    """What rebuilding the inputs base+1 … layer adds: them, and the attention outputs that were not kept."""
    missing = sum(sizes.attention_of(each) for each in range(base, layer) if not attentions[each])
    return (layer - base) * sizes.input_total + missing


def segmented(inputs: int, attentions: Sequence[bool], sizes: LayerBytes, budget: int) -> KeptLayers | None:
    """A plan that keeps `inputs` inputs and never holds more than `budget` bytes; None where there is none."""
    kept_bytes = _attention_bytes(attentions, range(len(attentions)), sizes) + sizes.all_states
    room = budget - inputs * sizes.input_total - kept_bytes
    bases: list[int] = []
    top = len(attentions)
    while top and room >= 0 and len(bases) < inputs:
        base = top - 1
        while base and rebuild_bytes(attentions, base - 1, top - 1, sizes) <= room:
            base -= 1
        bases.append(base)
        room += sizes.input_total + _attention_bytes(attentions, range(base, top), sizes)
        room += sum(map(sizes.state_total, range(base, top)))
        top = base
    if top or room < 0:
        return None
    _split_largest(bases, len(attentions), inputs)
    without = sizes.attends[: len(attentions)].count(False)
    return KeptLayers(tuple(layer in bases for layer in range(len(attentions))), tuple(attentions), without)


def _split_largest(bases: list[int], layers: int, count: int) -> None:
    """Halve the longest segment until there are `count`; halves never need more room than the whole did."""
    while len(bases) < count:
        edges = [*sorted(bases), layers]
        size, base = max((stop - start, start) for start, stop in zip(edges, edges[1:], strict=False))
        bases.append(base + size // 2)


def candidates(
    policy: str, sizes: LayerBytes, budget: int, ratios: Sequence[float], most_outputs: int | None = None
) -> Iterator[KeptLayers]:
    """Plans of a policy whose peak is within `budget`, the fastest first.

    Args:
        policy: a value of `FPDTPlugin.checkpoints`.
        budget: bytes that all tiers hold together.
        ratios: of each layer with a backward pass, cost of its attention forward over that of its token-wise rest.
        most_outputs: attention outputs that "auto" may keep; None: of all layers.
    """
    layers = len(ratios)
    if policy == "segment":
        yield from _least(layers, sizes, budget)
        return
    attending = [layer for layer in range(layers) if sizes.has_attention(layer)]
    every, most = [len(attending)], len(attending) if most_outputs is None else most_outputs
    outs = {"attention": every, "linears": every, "input": [0]}.get(policy, range(most + 1))
    ins = [layers] if policy in ("input", "linears") else range(1, layers + 1)
    # First of the layers whose attention costs most; of equals the last, whose outputs are freed first, and make room
    # for what is rebuilt below.
    order = sorted(attending, key=lambda layer: (ratios[layer], layer), reverse=True)
    reruns = {n_out: _sum(ratios[layer] for layer in order[n_out:]) for n_out in outs}
    costs = sorted((reruns[n_out] + (layers - n_in), -n_in, n_out) for n_out in outs for n_in in ins)
    for _, minus_n_in, n_out in costs:
        rerun = set(order[n_out:])
        plan = segmented(-minus_n_in, [layer not in rerun for layer in range(layers)], sizes, budget)
        if plan is not None:
            yield plan


def _sum(values: Iterable[float]) -> float:
    """Of few different values, each times its count: what costs the same must be the same number."""
    return sum(value * count for value, count in Counter(values).items())


def _least(layers: int, sizes: LayerBytes, budget: int) -> Iterator[KeptLayers]:
    """The plan without attention outputs that holds least, if it is within `budget`."""
    least = least_bytes("segment", layers, sizes)
    if least <= budget:
        # Of several the one that keeps most inputs: it rebuilds fewest layers.
        yield next(_without_outputs(layers, sizes, least))


def _without_outputs(layers: int, sizes: LayerBytes, budget: int) -> Iterator[KeptLayers]:
    """Plans without attention outputs that never hold more than `budget`, those that keep most inputs first."""
    none = [not sizes.has_attention(layer) for layer in range(layers)]
    plans = (segmented(inputs, none, sizes, budget) for inputs in range(layers, 0, -1))
    return (plan for plan in plans if plan is not None)


def least_bytes(policy: str, layers: int, sizes: LayerBytes) -> int:
    """The smallest budget with which the policy has a plan."""
    if policy == "linears":
        every = tuple(tuple(KeptChunks(len(linear.chunks)) for linear in layer) for layer in sizes.linears)
        there = (True,) * layers
        return forward_bytes(KeptLayers(there, there, linears=every), sizes)

    def plans(budget: int) -> Iterator[KeptLayers]:
        # To keep no attention output never needs more: what a rebuild makes of them is held for a shorter time.
        if policy in ("segment", "auto"):
            return _without_outputs(layers, sizes, budget)
        return candidates(policy, sizes, budget, (0.0,) * layers)

    low, high = 0, layers * (sizes.input_total + sizes.attention_total) + sizes.all_states
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if next(plans(middle), None) is None else (low, middle)
    return low
