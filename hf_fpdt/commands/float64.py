"""A float64 model of transformers computed in float64 throughout.

transformers casts parts of any model to fp32: norms, the softmax of eager attention, routers, rotary embeddings, the
loss. Two ways of computing the same model then differ by fp32's rounding, and a small mistake by no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PRODUCT = "__matmul__"
CASTS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (Tensor, ("to", "type", "float", "softmax", PRODUCT)),
    (torch, ("softmax",)),
    (nn.functional, ("softmax",)),
)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Inside, casts to fp32 leave float64 alone."""
    before = [(owner, name, getattr(owner, name)) for owner, names in CASTS for name in names]
    for owner, name, function in before:
        setattr(owner, name, _widened(function) if name == PRODUCT else _wide(function))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype != torch.float64:
            return function(x, *args, **kwargs)
        kept = tuple(arg for arg in args if arg is not torch.float32)
        options = {name: value for name, value in kwargs.items() if value is not torch.float32}
        if function.__name__ == "float" or (not kept and not options and (args or kwargs)):
            return x
        return function(x, *kept, **options)

    return call


def _widened(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Of frequencies in float64 and positions, which are whole numbers cast to fp32."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return product(a.to(dtype), b.to(dtype)) if torch.float64 in (a.dtype, b.dtype) else product(a, b)

    return call
