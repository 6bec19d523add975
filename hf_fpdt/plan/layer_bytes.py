"""Bytes of what one layer may keep for its backward pass, by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class LinearBytes(NamedTuple):
    """Output of one linear, by chunk; its name is that of its checkpoint, see `LinearSize`."""

    name: str
    late: bool
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer would keep, by chunk, on one rank.

    Attributes:
        inputs: the layer's input.
        outs: attention's output for this rank's heads.
        lses: its lse.
        attends: of each layer of the pass whether it has attention; (): all have.
        states: of each layer of the pass the states that it hands on, by name, between any two chunks; (): none.
        linears: of each layer of the pass its linears' outputs, in the order of calls; (): none is known.
    """

    inputs: tuple[int, ...]
    outs: tuple[int, ...]
    lses: tuple[int, ...]
    attends: tuple[bool, ...] = ()
    states: tuple[Mapping[str, int], ...] = ()
    linears: tuple[tuple[LinearBytes, ...], ...] = ()

    def has_attention(self, layer: int) -> bool:
        """Whether a layer of the pass, the lowest 0, has attention."""
        return self.attends[layer] if self.attends else True

    def attention_of(self, layer: int) -> int:
        """Output and lse of all chunks of one layer of the pass."""
        return self.attention_total if self.has_attention(layer) else 0

    def states_of(self, layer: int) -> Mapping[str, int]:
        """The states of one layer of the pass, at each border between chunks."""
        return self.states[layer] if self.states else {}

    def state_total(self, layer: int) -> int:
        """Of all borders."""
        return sum(self.states_of(layer).values()) * (len(self.inputs) - 1)

    @cached_property
    def all_states(self) -> int:
        """Of all layers and borders."""
        return sum(map(self.state_total, range(len(self.states))))

    @cached_property
    def input_total(self) -> int:
        """Of all chunks."""
        return sum(self.inputs)

    @cached_property
    def attention_total(self) -> int:
        """Output and lse of all chunks."""
        return sum(self.outs) + sum(self.lses)

    def linears_of(self, layer: int) -> tuple[LinearBytes, ...]:
        """Outputs of the linears of one layer of the pass."""
        return self.linears[layer] if self.linears else ()

    @property
    def longest(self) -> int:
        """Of the longest entry that may go to a file."""
        states = (size for layer in self.states for size in layer.values())
        return max(*self.inputs, *self.outs, *self.lses, *states)
