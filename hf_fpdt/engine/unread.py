"""Values inside a layer that no gradient is made of, such as an MLP's where it is only added to what went in.

A layer is replayed for its graph, so what gives such a value need not be computed then. The layer itself is asked,
twice. It is seen of which values autograd saves something, or something that was made of them; what kernels outside of
PyTorch make is not seen. So gradients and states must also stay what they are with other numbers in the value's place.
Where tensors have no memory, the first answer has to do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .gradients import norm_of
from .layer_state import hooks_everywhere, hooks_of, is_fsdps

# One that spreads, and one that a comparison finds.
OTHER_NUMBERS = (math.nan, math.inf)
# Of who looks for such numbers, in a layer or in anomaly mode.
REFUSALS = (ArithmeticError, AssertionError, RuntimeError, ValueError)


class ValuesSeen:
    """What the modules of a layer gave that may be added to its hidden states, in one forward pass.

    Args:
        layer: the layer.
        like_BSD: what it is given.
        attends: whether it has called attention by now.
    """

    def __init__(self, layer: nn.Module, like_BSD: Tensor, attends: Callable[[], bool]) -> None:
        self._layer, self._like, self._attends = layer, like_BSD, attends
        self._calls: dict[str, list[bool]] = {}
        self._order: list[str] = []  # in which modules ended
        self._saved = _Saved()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Around the layer's forward, which runs with gradients."""
        hooks = saved_tensors_hooks(self._saved.note, lambda value: value)
        with ExitStack() as stack:
            for name, module in self._layer.named_modules():
                if name:
                    stack.enter_context(_hook(module, self._noted(name)))
            with torch.enable_grad(), hooks, self._saved:
                yield

    def _noted(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._order.append(name)
            like = self._like
            if isinstance(output, Tensor) and output.shape[-1:] == like.shape[-1:] and output.numel() == like.numel():
                self._calls.setdefault(name, []).append(self._attends())
                self._saved.mark(output, frozenset({name}))

        return note

    def never_saved(self, *, attends: bool) -> frozenset[str]:
        """Modules of whose values nothing was saved, and which no hook of a user gets to see.

        PEFT's layers count as a whole. They were called once, for all tokens, after attention if the layer attends.
        """
        if hooks_everywhere():
            return frozenset()
        modules = dict(self._layer.named_modules())
        inside = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "base_layer"))
        called = {name for name, late in self._calls.items() if len(late) == 1 and late[0] == attends}
        hooked = {name for name, module in modules.items() if name and not all(map(is_fsdps, hooks_of(module)))}
        names = {name for name in called - self._saved.names if not name.startswith(inside)}
        return frozenset(name for name in names if not hooked & self._passed(name))

    def _passed(self, name: str) -> set[str]:
        """Modules through which the value of one may pass: what ends after it, and what it is part of."""
        around = {name[:at] for at, letter in enumerate(name) if letter == "."}
        return around.union(self._order[self._order.index(name) :])


def unread_values(
    layer: nn.Module, names: Iterable[str], outcome: Callable[[], Sequence[Tensor]], tolerance: float
) -> frozenset[str]:
    """Those of some modules whose values may be any numbers.

    Args:
        names: of modules in the layer that give one tensor.
        outcome: runs the layer forward and backward; gradients, and states that it leaves.
        tolerance: share of a tensor's norm that is rounding.
    """
    names, truth = sorted(names), outcome()

    def same(replaced: Sequence[str], number: float) -> bool:
        try:
            with ExitStack() as stack:
                for name in replaced:
                    hook = functools.partial(_replace, number)
                    stack.enter_context(_hook(layer.get_submodule(name), hook))
                found = outcome()
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            return False
        pairs = list(zip(found, truth, strict=False))
        close = (bool(a.isfinite().all()) and norm_of(a - b) <= tolerance * norm_of(b) for a, b in pairs)
        return len(found) == len(truth) and all(close)

    if all(same(names, number) for number in OTHER_NUMBERS):
        return frozenset(names)
    return frozenset(name for name in names if all(same([name], number) for number in OTHER_NUMBERS))


def _replace(number: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    replaced: Tensor = _Replaced.apply(output, number)
    return replaced


class _Replaced(torch.autograd.Function):
    """A number in the place of a value, whose gradient goes on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, number: float) -> Tensor:
        return torch.full_like(value, number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Saved(TorchDispatchMode):
    """Which marked tensors, or what was made of them, autograd saves.

    Attributes:
        names: the marks of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()
        self._marks: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the same memory

    def mark(self, value: Tensor, names: frozenset[str]) -> None:
        self._marks[_memory(value)] = self._of(value) | names
        self._alive.append(value)

    def note(self, value: Tensor) -> Tensor:
        self.names |= self._of(value)
        return value

    def _of(self, value: Tensor) -> frozenset[str]:
        return self._marks.get(_memory(value), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        output = func(*args, **(kwargs or {}))
        names = frozenset[str]().union(*map(self._of, given))
        made = given if func._schema.is_mutable else []
        for leaf in [*tree_leaves(output), *made] if names else []:
            if isinstance(leaf, Tensor):
                self.mark(leaf, names)
        return output


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
