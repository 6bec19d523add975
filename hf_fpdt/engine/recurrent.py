"""Recurrent layers (gated delta net, KDA, Mamba-2, short convolutions): what they hand from one chunk to the next.

Transformers' mixers all speak to a cache: given one and more than one token they go on from its states, and put the
last ones in. `StandInCache` is given to a layer in a cache's place for one chunk. It hands over the states that the
chunk before left, and takes those that this one leaves; nothing of the model is wrapped, and nothing is written in
place, so that autograd goes through. Forward the chunks ascend. Backward they descend, and each is one forward and
backward pass: (output, last states) against (gradient of the output, gradient of the states that the next chunk began
with). A layer that only convolves, or has attention beside its recurrence, is no other case.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import (
    STATES,
    ChunkDocuments,
    SequenceParallelGroup,
    convolution_of_documents,
    heads_of_scan,
    inputs_before,
    kernel_behind,
    over_ranks,
    scan_marks,
    scan_of_documents,
)
from ..plan import CONV

# What layers call a cache: since transformers 5.24, and before.
_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params")
RECURRENT = "recurrent"


class StandInCache:
    """Stands in for transformers' cache during one chunk of one layer.

    Args:
        before: tokens of the sequence before the chunk; or of each of its tokens less its place among them, [S].
        states: what the chunk before left, by name; {} at the beginning.
        leaves: whether the layer gets leaves of them that want gradients.
        group: the ranks that share the chunk.
        part: the documents of the chunk of a packed row, if the layer runs on all of them at once; then states are
            given to the one that goes on, and left by the last one.

    Attributes:
        asked: whether the layer asked how many tokens came before.
        given: the states as the layer got them.
        finals: those that the layer left.
    """

    def __init__(
        self,
        before: int | Tensor,
        states: Mapping[str, Tensor] | None = None,
        *,
        leaves: bool = False,
        group: SequenceParallelGroup | None = None,
        part: ChunkDocuments | None = None,
    ) -> None:
        self.before, self.asked = before, False
        self._group, self.part = SequenceParallelGroup() if group is None else group, part
        states = {} if part is not None and not part.goes_on else states or {}
        self.given = {
            name: state.detach().requires_grad_(leaves and state.is_floating_point()) for name, state in states.items()
        }
        self.finals: dict[str, Tensor] = {}

    # -- what every layer may ask -------------------------------------------------------------------------------------

    def get_seq_length(self, *_: Any, **__: Any) -> int | Tensor:
        """Tokens before; what a layer adds its tokens' places to."""
        if self.part is not None and not isinstance(self.before, Tensor):
            raise NotImplementedError("it asks how many tokens came before, which is another number in each document")
        self.asked = True
        return self.before

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What was given: attention has the keys before elsewhere."""
        return key, value

    # -- transformers' protocol of recurrent layers -------------------------------------------------------------------

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Whether there are states to go on from."""
        return bool(self.given)

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """Yes: the way of a single token, which writes states in place, is not ours."""
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution, [B, channels, kernel]; None at the beginning."""
        return self.given.get(f"{CONV} {state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a scan; None at the beginning."""
        return self.given.get(f"{RECURRENT} {state_idx}")

    def update_conv_state(
        self, new_BCS: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """The last inputs before the chunk and the chunk's own, [B, C, kernel + S]."""
        before = self.get_conv_state(layer_idx, state_idx)
        if before is None:
            if conv_kernel_size is None:
                raise NotImplementedError("its convolution does not say how many inputs it needs of those before")
            before = new_BCS.new_zeros(*new_BCS.shape[:-1], conv_kernel_size)
        before, last = inputs_before(self._group, before, new_BCS)
        if self.part is not None:
            before = self.part.without_others(before, before_own=True)
            last = self.part.without_others(last, before_own=False)
        self.finals[f"{CONV} {state_idx}"] = last
        return torch.cat([before, new_BCS], dim=-1)

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Takes the state that a scan ended with."""
        self.finals[f"{RECURRENT} {state_idx}"] = new
        return new

    @property
    def layers(self) -> _OneLayer:
        """By any index the same layer: how transformers before 5.24 reads states."""
        return _OneLayer(self)


class _OneLayer:
    """A layer of the cache, as transformers before 5.24 asks for it."""

    record_past = True

    def __init__(self, cache: StandInCache) -> None:
        self._cache = cache

    def __getitem__(self, layer_idx: int) -> _OneLayer:
        return self

    @property
    def conv_states(self) -> _States:
        """By number."""
        return _States(self._cache.get_conv_state)

    @property
    def recurrent_states(self) -> _States:
        """By number."""
        return _States(self._cache.get_recurrent_state)


class _States:
    def __init__(self, state: Callable[[int, int], Tensor | None]) -> None:
        self._state = state

    def __getitem__(self, state_idx: int) -> Tensor | None:
        return self._state(0, state_idx)


def kernels_of(layer: nn.Module) -> dict[str, Callable[..., Any]]:
    """By name, the functions that a layer's modules call and that a package may have in place of PyTorch's.

    Transformers chooses between the two when a model's file is imported: flash-linear-attention, mamba-ssm,
    causal-conv1d where they are installed.
    """
    found = {}
    for module in layer.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        names = vars(sys.modules[type(module).__module__])
        for name in code.co_names if code is not None else ():
            if _chosen(names.get(name)):
                found[name] = names[name]
    return found


def _chosen(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.endswith("hub_kernels.py") and hasattr(function, "__wrapped__")


@contextmanager
def _rebound(layer: nn.Module, other: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, each of these is what `other` makes of it; one thread at a time is in a layer."""
    names = [vars(module) for module in {sys.modules[type(module).__module__] for module in layer.modules()}]
    before = [(each, name, function) for each in names for name, function in each.items() if _chosen(function)]
    for each, name, function in before:
        each[name] = other(function)
    try:
        yield
    finally:
        for each, name, function in before:
            each[name] = function


def plain_kernels(layer: nn.Module) -> AbstractContextManager[None]:
    """Inside, all of these are transformers' own functions in PyTorch."""
    return _rebound(layer, lambda function: function.__wrapped__)


def scans_over(
    layer: nn.Module, group: SequenceParallelGroup, part: ChunkDocuments | None = None, *, marked: bool = False
) -> AbstractContextManager[None]:
    """Inside, a layer's scans go over the tokens of all ranks, each for its own heads, and stop at documents' ends.

    Args:
        part: the documents of the chunk of a packed row, if the layer runs on all of them at once.
        marked: whether kernels are given marks of documents.
    """
    if group.size == 1 and (part is None or len(part.edges) == 2):
        return nullcontext()

    def other(function: Any) -> Any:
        if part is not None and _is_convolution(function):
            return convolution_of_documents(function, part)
        if not _is_scan(function):
            return function
        scan = function if part is None else scan_of_documents(function, part, marked=marked)
        return scan if group.size == 1 else over_ranks(scan, group)

    return _rebound(layer, other)


def scans_seen(layer: nn.Module, heads: set[int]) -> AbstractContextManager[None]:
    """Inside, the numbers of heads of a scan's inputs are added to `heads`."""

    def seen(function: Any) -> Any:
        def scan(*args: Any, **kwargs: Any) -> Any:
            heads.update(heads_of_scan(dict(enumerate(args)) | kwargs).values())
            return function(*args, **kwargs)

        return scan if _is_scan(function) else function

    return _rebound(layer, seen)


def takes_marks(layer: nn.Module) -> bool:
    """Whether a scan of the layer is a kernel that takes marks of documents."""
    return any(_is_scan(function) and scan_marks(function) for function in kernels_of(layer).values())


def scan_packages(model: nn.Module) -> dict[str, str | None]:
    """Of each scan that recurrent layers of a model call, the package that it comes from; None: PyTorch alone."""
    found = {}
    scans = {name: function for name, function in kernels_of(model).items() if _is_scan(function)}
    for name, function in scans.items():
        own = getattr(kernel_behind(function), "__module__", "transformers").partition(".")[0]
        found[name] = None if own == "transformers" else own
    return found


def _is_scan(function: Any) -> bool:
    return any(name in inspect.signature(function).parameters for name in STATES)


def _is_convolution(function: Any) -> bool:
    return list(inspect.signature(function).parameters)[1:2] == ["weight"]


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a layer's forward calls its cache; None where it takes none."""
    return next((name for name in _NAMES if name in inspect.signature(forward).parameters), None)


def hidden_states_of(output: Any) -> Tensor:
    """Of a layer's output, which must be hidden states alone, or a tuple of them and Nones."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    if not values or not isinstance(values[0], Tensor) or any(value is not None for value in values[1:]):
        names = ", ".join(type(value).__name__ for value in values)
        raise NotImplementedError(f"it returns {names}, not hidden states alone")
    return values[0]
