"""What a layer was seen to do when it was tried; how it is built, which says whether it still is that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..attention import AttentionSpec
from ..plan import CONV, AttentionSizes, LinearSize, StateSize
from .recurrent import StandInCache

SMALL_BUFFER = 2**20  # elements
# How a layer that asks for its cache runs on a chunk of several documents: once, its scans given marks of them; once,
# its scans called for each of them; once, told of each token how many came before; or as a whole for each of them.
ByDocuments = Literal["marks", "scans", "places", "layer"]


@dataclass(frozen=True)
class Asked:
    """What a layer asks of attention when it is called.

    Attributes:
        spec: the kind, with the window that the mask has.
        dtype: of queries.
        heads: how many there are, and how wide they are.
    """

    spec: AttentionSpec
    dtype: torch.dtype
    heads: AttentionSizes


@dataclass(frozen=True)
class LayerTraits:
    """What a layer was seen to do when it was tried.

    Attributes:
        attends: whether it calls attention.
        cache: what it calls its cache, where it is to be given one.
        states: what it hands from chunk to chunk.
        channels: of its convolutions together.
        scan_heads: of each input of its scan.
        outputs: where it returns a tuple, of how many, hidden states and Nones; 0: hidden states alone.
        asked: of attention, where it calls that.
        by_documents: how it runs on packed rows, where it asks for its cache and that was tried.
        linears: those whose outputs may be kept.
        unread: modules whose values no gradient and no state is made of.
    """

    attends: bool = True
    cache: str | None = None
    states: tuple[StateSize, ...] = ()
    channels: int = 0
    scan_heads: tuple[int, ...] = ()
    outputs: int = 0
    asked: Asked | None = None
    by_documents: ByDocuments | None = None
    linears: tuple[LinearSize, ...] = ()
    unread: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, given: StandInCache, name: str | None, output: Any, *, attends: bool, asked: Asked | None
    ) -> LayerTraits:
        """As a layer was seen to do on some tokens.

        Args:
            given: what it was given in place of a cache.
            name: what it calls its cache.
            output: what it returned; None where it did not get so far.
            attends: whether it called attention.
            asked: what it asked of attention.
        """
        inputs = {state: value for state, value in given.finals.items() if state.startswith(CONV)}
        return cls(
            attends=attends,
            cache=name if given.asked or given.finals else None,
            # Inputs of convolutions are as wide as hidden states are.
            states=tuple(
                StateSize(state, value[0].numel(), 0 if state in inputs else value.element_size())
                for state, value in given.finals.items()
            ),
            channels=sum(value.shape[1] for value in inputs.values()),
            outputs=len(output) if isinstance(output, (tuple, list)) else 0,
            asked=asked,
        )

    @property
    def is_recurrent(self) -> bool:
        """Whether it carries a state."""
        return bool(self.states)

    def returned(self, hidden_BSD: Tensor) -> Any:
        """Hidden states as the layer returns them."""
        return (hidden_BSD, *(None,) * (self.outputs - 1)) if self.outputs else hidden_BSD


def look_of(layer: nn.Module) -> tuple[object, ...]:
    """What of a layer may change from step to step and change what it computes: modules, modes, hooks, what trains."""
    found: list[object] = []
    for module in layer.modules():
        own = vars(module)
        patch = own.get("_fpdt")
        forward = own.get("forward") if patch is None else patch.instance_forward
        found += (type(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
        found.append(None if forward is None else id(forward))
        found += [weight.requires_grad for weight in own["_parameters"].values() if weight is not None]
        if "_active_adapter" in own:
            found += (str(own["_active_adapter"]), own.get("_disable_adapters"))
    return tuple(found)


def build_of(layer: nn.Module) -> tuple[object, ...]:
    """What layers have in common that compute alike, whatever their weights; hooks of a user make each its own."""
    found: list[object] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not key.startswith("_fpdt") and not _is_place(key)
        }
        found += [name, type(module), *plain.items(), str(vars(module).get("_active_adapter"))]
        weights = ((key, weight) for key, weight in module._parameters.items() if weight is not None)
        found += [(key, tuple(weight.shape), weight.dtype, weight.requires_grad) for key, weight in weights]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            found += [key for key, hook in hooks.items() if not is_fsdps(hook)]
    return tuple(found)


def _is_place(name: str) -> bool:
    """Whether an attribute says where in the model a layer stands."""
    return name.endswith(("idx", "index", "layer_id", "layer_number"))


def is_fsdps(hook: Any) -> bool:
    """Whether a module's hook is FSDP2's, not a user's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def hooks_of(module: nn.Module) -> list[Any]:
    """Those that get what goes into a module or comes out, forward or backward."""
    every = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for hooks in every for hook in hooks.values()]


def hooks_everywhere() -> bool:
    """Whether there are hooks on every module of the process."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


class Buffers:
    """A layer's buffers as they are now."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.found = [
            (module, key, buffer, None if buffer.is_inference() else buffer._version, _small_copy(buffer))
            for module in layer.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def changed(self) -> str | None:
        """Why they are not what they were."""
        for module, key, buffer, version, _ in self.found:
            now = module._buffers.get(key)
            if now is not buffer or (version is not None and now._version != version):
                return (
                    f"its buffer {key} ({type(module).__name__}) changes with each forward pass, of which chunks make "
                    "several, and their replays more"
                )
        return None

    def restore(self) -> None:
        """Put back what was written."""
        for module, key, buffer, version, copy in self.found:
            if copy is not None and version is not None and buffer._version != version:
                buffer.detach().copy_(copy)
            module._buffers[key] = buffer


def _small_copy(buffer: Tensor) -> Tensor | None:
    return buffer.detach().clone() if buffer.numel() <= SMALL_BUFFER else None


class LinearsSeen:
    """What the linears of a layer did in one forward pass over some tokens.

    A linear with an adapter around it (PEFT's `base_layer`) goes by the name of the whole. Every kind of linear is
    seen that has a plain weight at the time; whether it computes what a linear does is not said.
    """

    def __init__(self, layer: nn.Module, like_BSD: Tensor, attends: Callable[[], bool]) -> None:
        self._tokens, self._dtype = like_BSD.shape[:-1].numel(), like_BSD.dtype
        self._layer, self._attends = layer, attends
        self._calls: dict[str, list[tuple[LinearSize, Tensor, int, Tensor]]] = {}

    @contextmanager
    def watched(self) -> Iterator[LinearsSeen]:
        """Around the layer's forward."""
        handles, inside = [], tuple[str, ...]()
        for name, module in self._layer.named_modules():
            base = getattr(module, "base_layer", module)
            plain = isinstance(base, nn.Linear) and type(base.weight) is nn.Parameter
            if plain and not name.startswith(inside):
                handles.append(module.register_forward_hook(self._noted(name, base)))
                inside = inside if base is module else (*inside, f"{name}.")
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _noted(self, name: str, linear: nn.Linear) -> Callable[..., None]:
        size = LinearSize(name, linear.in_features, linear.out_features)

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # some routers are linears by their class, and give more
                call = size._replace(late=self._attends()), output, output._version, output.detach().clone()
                self._calls.setdefault(name, []).append(call)

        return note

    def found(self) -> tuple[LinearSize, ...]:
        """Those that were called once, on all tokens, in hidden states' dtype, and whose output nobody wrote to.

        An output that is written to in place, by whatever kernel, is not what the linear gave.
        """
        calls = [calls[0] for calls in self._calls.values() if len(calls) == 1]
        return tuple(
            size
            for size, output, version, copy in calls
            if output.dtype == self._dtype
            and output.numel() == self._tokens * size.outputs
            and output._version == version
            and (output.is_meta or torch.equal(_bytes(output), _bytes(copy)))
        )


def _bytes(value: Tensor) -> Tensor:
    """What is no number is equal to itself."""
    return value.detach().contiguous().view(torch.uint8)
