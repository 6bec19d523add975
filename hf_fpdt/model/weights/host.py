"""Frozen weights of layers in pinned host memory: fetched one layer ahead of use, forward and backward, never back.

A layer's weights lie side by side in one buffer, so a layer is one copy, on a stream of its own. While the layer is
entered its modules have the copy; what travels of quantised weights is packed. Weights that train stay on the device,
and so do adapters and modules that are saved with them, whether or not they train now: PEFT freezes those that do not
act. To everybody else a layer's weights are tensors of the CPU, which can be saved, merged into and counted as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...memory import PinnedMemory, Transfers, host_bytes_available
from ...units import GIB
from ..adapters import adapter_weights
from .quantised import is_packed, parts_of, with_parts

ALIGNED = 256  # bytes; what every kernel may ask of a matrix
SCOPE = "host_weights=True keeps the frozen weights of layers in host memory"


@dataclass
class _Place:
    """One weight of a layer: where it is put, and where its tensors lie in the layer's buffer.

    Attributes:
        module, name: its place in the layer.
        weight: what is there while the layer rests.
        starts: bytes before each of its tensors.
    """

    module: nn.Module
    name: str
    weight: Any
    starts: list[int]


class HostLayer:
    """The weights of one layer in a buffer of the host, pinned where there is a GPU.

    Args:
        layer: a decoder layer.
        everything: take what trains too, as long as nothing of it is frozen and it has no adapters.
    """

    def __init__(self, layer: nn.Module, *, everything: bool) -> None:
        self.layer, self.everything = layer, everything
        self.memory = PinnedMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.places: list[_Place] = []
        self.nbytes = 0
        for module, name, weight in self._waiting():
            self._add(module, name, weight)
        self.buffer = self.memory.buffer(max(1, self.nbytes))
        with torch.no_grad():
            for place in self.places:
                parts = parts_of(place.module, place.weight)
                views = [_lasting(self.buffer, start, part) for start, part in zip(place.starts, parts, strict=True)]
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part)
                with_parts(place.module, place.weight, views, inplace=True)

    def _add(self, module: nn.Module, name: str, weight: Any) -> None:
        starts = []
        for part in parts_of(module, weight):
            starts.append(self.nbytes)
            self.nbytes += aligned(part.numel() * part.element_size())
        self.places.append(_Place(module, name, weight, starts))

    def _waiting(self) -> list[tuple[nn.Module, str, Any]]:
        """What waits of the layer as it is now: a module, the name of a weight in it, the weight."""
        adapters = adapter_weights(self.layer)
        own = [
            (module, name, weight)
            for module in self.layer.modules()
            for name, weight in module._parameters.items()
            if weight is not None and id(weight) not in adapters
        ]
        if self.everything and not adapters and all(w.requires_grad or is_packed(w) for _, _, w in own):
            return own
        return [place for place in own if not place[2].requires_grad]

    def waiting(self) -> list[_Place]:
        """Of its places those whose weight still waits: it is there, and does not train beside others that do not."""
        there = {(id(module), name): weight for module, name, weight in self._waiting()}
        return [place for place in self.places if there.get((id(place.module), place.name)) is place.weight]

    def is_current(self) -> bool:
        """Whether the weights that wait are these, where they were put; PEFT and casts put others there."""
        own, there = [(place.module, place.name, place.weight) for place in self.places], self._waiting()
        if [list(map(id, place)) for place in own] != [list(map(id, place)) for place in there]:
            return False
        return all(
            part.data_ptr() == self.buffer.data_ptr() + start
            for place in self.places
            for part, start in zip(parts_of(place.module, place.weight), place.starts, strict=True)
            if part.numel()
        )

    def give_back(self) -> None:
        """Give weights that train now memory of their own, so that the buffer can go; a model that is moved has."""
        for place in self.places:
            weight, start = place.weight, self.buffer.data_ptr() + place.starts[0]
            if weight.requires_grad and weight.data_ptr() == start:
                weight.data = weight.data.clone()

    def versions(self) -> tuple[int, ...]:
        """How often each weight was written."""
        return tuple(place.weight._version for place in self.places)

    def trained(self) -> str | None:
        """The name of a weight that trains, if one does."""
        places = {id(place.weight) for place in self.places if place.weight.requires_grad}
        return next((name for name, weight in self.layer.named_parameters() if id(weight) in places), None)

    @contextmanager
    def replaced(self, filled: Tensor) -> Iterator[None]:
        """Inside, the layer has the weights that lie in a copy of its buffer."""
        try:
            for place in self.places:
                parts = parts_of(place.module, place.weight)
                views = [_part(filled, start, part) for start, part in zip(place.starts, parts, strict=True)]
                place.module._parameters[place.name] = with_parts(place.module, place.weight, views, inplace=False)
            yield
        finally:
            for place in self.places:
                place.module._parameters[place.name] = place.weight


class HostWeights:
    """Weights of all layers of a model on the host, and those that are on the device now.

    Args:
        layers: of the decoder, with memory.
        everything: nothing is frozen yet: all that they have now will be, before the first step.

    Raises:
        MemoryError: the host does not hold them; those that were moved stay where they are.
    """

    def __init__(self, layers: Sequence[nn.Module], *, everything: bool) -> None:
        self._check_room(sum(_bytes_of(layer) for layer in dict.fromkeys(layers) if next(layer.parameters()).is_cuda))
        self._layers: dict[int, HostLayer] = {}  # by the first place of each
        for layer in dict.fromkeys(layers):
            self._check_room(_bytes_of(layer))
            self._layers[list(layers).index(layer)] = HostLayer(layer, everything=everything)
        self._transfers: Transfers | None = None
        self._fetched: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._waits: int | None = None  # the layer whose copy waits for its backward pass

    def __deepcopy__(self, memo: dict[int, Any]) -> HostWeights:
        return self  # of a module that is copied within the model, as PEFT does it; see `_place`

    @property
    def nbytes(self) -> int:
        """Of the host."""
        return sum(layer.memory.nbytes for layer in self._layers.values())

    @property
    def largest(self) -> int:
        """Bytes of the layer with most."""
        return max(layer.nbytes for layer in self._layers.values())

    def own(self) -> set[int]:
        """Weights that wait on the host, by id."""
        return {id(place.weight) for layer in self._layers.values() for place in layer.places}

    @property
    def on_device(self) -> int:
        """Bytes of layers that are on the device now."""
        return sum(self._layers[index].nbytes for index in self._fetched)

    def _check_room(self, needed: int) -> None:
        there = host_bytes_available()
        if needed > there:
            raise MemoryError(
                f"hf_fpdt: {SCOPE}; {needed / GIB:.1f} GiB more are needed, and {there / GIB:.1f} GiB are available "
                "to this process (6 GiB left to the system). Ways out: quantised weights (a BitsAndBytesConfig, "
                "--quantize nf4), a machine with more host memory, or weights on the GPU (host_weights=False)."
            )

    @contextmanager
    def entered(self, of: nn.Module, device: torch.device, then: int | None) -> Iterator[None]:
        """Inside, a layer has its weights on the device, and those of another one are on their way.

        Args:
            of: the layer.
            device: where it computes.
            then: the layer that is entered next, which may be the same; None: not known.
        """
        index = self._place(of)
        layer = self._current(index)
        stays = {index, then}
        if self._waits is not None and not (self._waits == index and torch.is_grad_enabled()):
            stays.discard(self._waits)  # no backward pass came, and weights may have changed since
        self._waits = None
        for other in self._fetched.keys() - stays:
            del self._fetched[other]
        if index not in self._fetched or self._fetched[index][1] != layer.versions():
            self._fetch(index, device)
        filled, is_done = self._fetched[index][0].tensor(), False
        try:
            with layer.replaced(filled):
                if then in self._layers and then not in self._fetched:
                    self._current(then)
                    self._fetch(then, device)
                yield
            is_done = True
        finally:
            self._leave(index, then, is_done=is_done)

    def _leave(self, index: int, then: int | None, *, is_done: bool) -> None:
        """Let go of a layer's copy, but where its own backward pass is next; of all where it ended in an error."""
        if not is_done:
            self._fetched.clear()
        elif then == index:
            self._waits = index
        else:
            del self._fetched[index]

    def _place(self, layer: nn.Module) -> int:
        for place, each in self._layers.items():
            if each.layer is layer:
                return place
        raise RuntimeError(
            f"hf_fpdt: {SCOPE}, and this {type(layer).__name__} is a copy of one: copy the model before FPDT is "
            "applied."
        )

    def check_adapters(self, layer: nn.Module, device: torch.device) -> None:
        """Raise RuntimeError where what stays on the device is not there: PEFT puts adapters where weights are."""
        own = {id(place.weight) for place in self._current(self._place(layer)).places}
        for name, weight in layer.named_parameters():
            if id(weight) not in own and weight.device.type != device.type:
                raise RuntimeError(
                    f"hf_fpdt: {SCOPE}; {name} is no such weight, and is on {weight.device} where hidden states are "
                    f"on {device}: call model.to({str(device)!r}) once adapters are on the model. The others stay."
                )

    def check_frozen(self, layer: nn.Module) -> None:
        """Raise NotImplementedError where a weight of the layer that is on the host trains."""
        index = self._place(layer)
        if name := self._current(index).trained():
            raise NotImplementedError(
                f"hf_fpdt: {SCOPE}, and {name} of layer {index} trains: freeze it (LoRA), or leave host_weights out."
            )

    def _current(self, index: int) -> HostLayer:
        """The layer as it is now, moved anew where somebody changed its weights' places."""
        layer = self._layers[index]
        if not layer.is_current():
            self._fetched.pop(index, None)
            self._layers[index] = HostLayer(layer.layer, everything=layer.everything)
            layer.give_back()
        return self._layers[index]

    def _fetch(self, index: int, device: torch.device) -> None:
        if self._transfers is None or self._transfers.device != device:
            self._transfers = Transfers(device)
            self._fetched.clear()
        layer = self._layers[index]
        shape = torch.Size([max(1, layer.nbytes)])
        fetch = self._transfers.to_device(layer.buffer, shape, torch.uint8, None)
        self._fetched[index] = (fetch, layer.versions())

    @contextmanager
    def left_alone(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Around `Module._apply`: weights stay on the host where a model is moved, and are cast where it is cast."""
        own = next((each for each in self._layers.values() if each.layer is layer), None)
        kept = [] if own is None else own.waiting()
        for place in kept:
            place.module._parameters[place.name] = None  # in its place: parameters keep their order
        try:
            yield
        finally:
            for place in kept:
                place.module._parameters[place.name] = place.weight
        for place in kept:
            if place.weight.is_floating_point() and not is_packed(place.weight):
                dtype = function(torch.empty(0, dtype=place.weight.dtype)).dtype
                place.weight.data = place.weight.data.to(dtype)

    def close(self) -> None:
        """Let go of what is on the device; the weights stay on the host, no longer pinned."""
        self._fetched.clear()
        self._transfers = None
        for layer in self._layers.values():
            layer.memory.release()


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Of a buffer's bytes a tensor."""
    stop = start + like.numel() * like.element_size()
    # `.data`: views share a count of writes, and one weight that is written says nothing of the others.
    return buffer[start:stop].view(like.dtype).view(like.shape).data


def _lasting(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The same of a buffer of the host, and with a storage of its own: torch saves storages, and whole ones."""
    own = torch.from_numpy(buffer[start : start + like.numel() * like.element_size()].numpy())
    return _part(own, 0, like)


def aligned(nbytes: int) -> int:
    """What a tensor takes in a layer's buffer."""
    return math.ceil(nbytes / ALIGNED) * ALIGNED


def _bytes_of(layer: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())


def put_on_host(model: nn.Module, layers: Sequence[nn.Module]) -> HostWeights | None:
    """Move layers' frozen weights into host memory; None of a model whose weights have no memory.

    Before adapters are put on a model nothing of it is frozen, so it is all that its layers have.

    Raises:
        MemoryError: the host does not hold them.
    """
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        return None
    frozen_yet = not all(weight.requires_grad or is_packed(weight) for weight in weights)
    return HostWeights(layers, everything=not frozen_yet)
