"""Outputs of linears that a step keeps beside inputs and attention outputs: those that save most a byte.

A linear whose output was kept is not computed again in backward. An element of an output costs as many bytes whichever
linear it is of, and saves 2 · in_features operations; twice that where K or V are made of it, which backward makes
once more. The first product of chosen experts is as a linear's. So those of a model come in few classes, and the
classes in order: of one class the last layers first, of a layer the last chunks, since backward begins with them.

The device comes first: what lies there costs nothing. What these outputs push from there to the host, inputs and
attention outputs of the first layers, and outputs that go to the host themselves, must cross the link while the layer
computes. So a layer may send to the host what crosses in a part of the time of its forward pass, and no more.

All of this is by the sizes of a step alone, not by the rates of a machine, so that a plan is the same wherever it is
made: bytes that cross a link while a matrix unit does one operation are much the same on all GPUs of a data center.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..layout import seen_pairs
from .checkpointing import KeptChunks, KeptLayers, peak_bytes
from .kv_bytes import KVBytes
from .layer_bytes import LayerBytes
from .model_sizes import LinearSize
from .operations import pass_work
from .sizes import StepSizes
from .tiers import LOOKAHEAD, Budgets

# Of an H100 7.8e-5, 52 GB/s over 670 TFLOP/s (`forecast.rates`); of an A100 9.6e-5.
LINK_BYTES_AN_OPERATION = 7.5e-5
# Of the time of a layer's products and attention, forward, that copies of what it keeps may take. Not measured yet.
LINK_SHARE = 0.6
# Where buffers are longer than what lies in them, there is room for less than all that the budgets hold.
ROOM_SHARES = (1.0, 0.98, 0.9, 0.7)
# Of a pass, the operations that must be saved before more host memory is pinned for it.
LEAST_GAIN = 0.005
# A budget of more is none: no tensor is as long, and `NO_LIMIT` less what a step has on the device is still more.
UNLIMITED = 2**61
KEEPS_LINEARS = ("auto", "linears")  # values of `FPDTPlugin.checkpoints`


def with_linears(
    policy: str, kept: KeptLayers, step: StepSizes, kv: KVBytes, budgets: Budgets
) -> Iterator[KeptLayers]:
    """The same plan with outputs of linears kept too: the fastest first, at last without any, where that may be.

    Args:
        policy: `FPDTPlugin.checkpoints`: "auto" keeps what pays, "linears" every one; others none.
        kept: what else is kept.
        kv: K and V of the step.
        budgets: what checkpoints may take.
    """
    sizes = step.layer_bytes(kept.layers)
    if policy == "linears" and sizes.linears:
        yield from _every(kept, sizes, budgets)
        return
    if policy == "auto" and sizes.linears:
        done = pass_work(step, kept, full=False).done
        for share in ROOM_SHARES:
            best, saved = kept, 0.0
            for room in _rooms(kept, step, kv, budgets):
                choice = _chosen(kept, step, room.part(share))
                gain = saved_operations(step, choice) - saved
                if gain > (LEAST_GAIN * done if room.pins else 0):
                    best, saved = choice, saved + gain
            if saved:
                yield best
    yield kept


def saved_operations(step: StepSizes, kept: KeptLayers) -> float:
    """Operations of one rank that a step does not do again because outputs of linears are kept."""
    first = step.model.layers - kept.layers
    return sum(
        saved_of(step, linear, chunks)
        for layer in range(len(kept.linears))
        for linear, chunks in zip(step.model.linears_of(first + layer), kept.linears_of(layer), strict=True)
    )


def saved_of(step: StepSizes, linear: LinearSize, chunks: KeptChunks) -> float:
    """The same of one linear of one layer."""
    count, tokens = len(step.plan.chunks), 0
    for chunk in step.plan.chunks[max(0, count - chunks.kept) :]:
        # K and V of the last chunk are made in its replay alone.
        uses = 2 if linear.captured and chunk.index < count - 1 else 1
        tokens += uses * (chunk.rank_stop - chunk.rank_start)
    return 2.0 * step.batch * tokens * linear.inputs * linear.outputs


def under_way_bytes(kept: KeptLayers, sizes: LayerBytes) -> int:
    """Device memory beside a step's own for outputs of linears on their way to the host and back; 0 where none go.

    A chunk's copies out may take as long as the next chunk, and a few reads are ahead.
    """
    pairs = (zip(sizes.linears_of(layer), each, strict=False) for layer, each in enumerate(kept.linears))
    away = (linear.chunks[0] for layer in pairs for linear, chunks in layer if chunks.kept > chunks.on_device)
    longest = max(away, default=0)
    return _under_way_bytes(sizes, longest) if longest else 0


def _under_way_bytes(sizes: LayerBytes, longest: int = UNLIMITED) -> int:
    """The same where those linears go to the host whose first chunk gives at most `longest` bytes."""
    firsts = [[linear.chunks[0] for linear in layer if linear.chunks[0] <= longest] for layer in set(sizes.linears)]
    return max(sum(layer) + LOOKAHEAD * max(layer, default=0) for layer in firsts)


def _every(kept: KeptLayers, sizes: LayerBytes, budgets: Budgets) -> Iterator[KeptLayers]:
    """All outputs of all linears, on the device from the last layer on, and then on the host."""
    every = sum(sum(linear.chunks) for layer in sizes.linears for linear in layer)
    device = budgets.device if every <= budgets.device else max(0, budgets.device - _under_way_bytes(sizes))
    for share in ROOM_SHARES:
        room, layers = int(share * device), list[tuple[KeptChunks, ...]]()
        for layer in reversed(sizes.linears):
            chosen = []
            for linear in reversed(layer):
                count = _fitting(linear.chunks, room)
                room -= sum(linear.chunks[len(linear.chunks) - count :])
                chosen.append(KeptChunks(len(linear.chunks), count))
            layers.append(tuple(reversed(chosen)))
        yield replace(kept, linears=tuple(reversed(layers)))


def _fitting(chunks: tuple[int, ...], room: int) -> int:
    """How many of the last chunks fit."""
    count = 0
    while count < len(chunks) and sum(chunks[len(chunks) - count - 1 :]) <= room:
        count += 1
    return count


@dataclass
class _Room:
    """Bytes that are left: of the device, of the host, of both, and of each layer for the link.

    Attributes:
        longest: of the first chunk of a linear that may go to the host, bytes at most.
        pins: whether more host memory is used than without outputs of linears.
    """

    device: int
    host: int
    total: int
    link: list[int]
    longest: int = UNLIMITED
    pins: bool = False

    def part(self, share: float) -> _Room:
        """Less of it."""
        return replace(self, device=int(share * self.device), total=int(share * self.total), link=list(self.link))

    def take(self, layer: int, chunks: tuple[int, ...]) -> KeptChunks:
        """As many of a linear's last chunks as there is room for; the device first."""
        device = _fitting(chunks, min(self.device, self.total))
        taken = sum(chunks[len(chunks) - device :])
        self.device, self.total = self.device - taken, self.total - taken
        left = chunks[: len(chunks) - device]
        may_go = chunks[0] <= self.longest
        host = _fitting(left, min(self.host, self.total, self.link[layer])) if may_go else 0
        taken = sum(left[len(left) - host :])
        self.host, self.total, self.link[layer] = self.host - taken, self.total - taken, self.link[layer] - taken
        return KeptChunks(device + host, device)


def _chosen(kept: KeptLayers, step: StepSizes, room: _Room) -> KeptLayers:
    """What saves most in a room, which is used up."""
    sizes, layers = step.layer_bytes(kept.layers), range(kept.layers)
    first = step.model.layers - kept.layers
    chosen = [[KeptChunks()] * len(sizes.linears_of(layer)) for layer in layers]
    known = [step.model.linears_of(first + layer) for layer in layers if room.total > 0]
    every = KeptChunks(len(step.plan.chunks))
    kinds = {linear for kind in set(known) for linear in kind}
    saved = {each: saved_of(step, each, every) / each.output_bytes(step.attention_bytes) for each in kinds}
    items = [(-saved[linear], -layer, i) for layer, kind in enumerate(known) for i, linear in enumerate(kind)]
    for _, minus_layer, i in sorted(items):
        layer = -minus_layer
        if room.total <= 0:
            break
        chosen[layer][i] = room.take(layer, sizes.linears_of(layer)[i].chunks)
    return replace(kept, linears=tuple(map(tuple, chosen)))


def _rooms(kept: KeptLayers, step: StepSizes, kv: KVBytes, budgets: Budgets) -> Iterator[_Room]:
    """What is free on the device; what is if other entries leave it; the same, and what may go to the host itself."""
    sizes, no_link = step.layer_bytes(kept.layers), [0] * kept.layers
    base = peak_bytes(kept, sizes)
    if budgets.device >= UNLIMITED:
        # Where there is no device, its memory is the host's.
        left = max(0, budgets.host - base)
        yield _Room(left, 0, left, no_link)
        return
    free = max(0, budgets.device - base)
    yield _Room(free, 0, free, no_link)
    left = budgets.device + budgets.host - base
    crossing = _crossing_bytes(kept, step, sizes)
    # Files are slow; streamed keys have the link; and what would not cross in time is not pushed out.
    if left <= 0 or kv.host_bytes or min(crossing) < 0:
        return
    yield _Room(budgets.device, 0, left, no_link, pins=True)
    # Of experts a chunk gives more than there may be room for on the way: then of others alone.
    for longest in sorted({linear.chunks[0] for layer in set(sizes.linears) for linear in layer}, reverse=True):
        away = _under_way_bytes(sizes, longest)
        if away < budgets.device:
            yield _Room(budgets.device - away, budgets.host, left - away, list(crossing), longest, pins=True)


def _crossing_bytes(kept: KeptLayers, step: StepSizes, sizes: LayerBytes) -> list[int]:
    """Of each layer, the bytes that may cross the link beside its other entries while it computes forward."""
    return [
        cross
        - sizes.input_total * kept.inputs[layer]
        - sizes.attention_of(layer) * kept.attentions[layer]
        - sizes.state_total(layer)
        for layer, cross in enumerate(_link_bytes(step, kept.layers))
    ]


def _link_bytes(step: StepSizes, layers: int) -> list[int]:
    """Of each of the last so many layers, the bytes that may cross the link while it computes forward."""
    m, ranks = step.model, step.plan.sp_size
    tokens = step.batch * step.plan.n_tokens / ranks
    found = []
    for window, mix in zip(step.windows_of_last(layers), step.mixes_of_last(layers), strict=True):
        pairs = step.batch * seen_pairs(0, step.plan.n_tokens, window) / ranks * mix.attends
        operations = tokens * (2 * mix.linear_weights + mix.scan_operations) + m.attention_forward(pairs)
        found.append(int(LINK_SHARE * LINK_BYTES_AN_OPERATION * operations))
    return found
