"""Parameter gradients of one layer, or of the head, added up over chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..numerics import accumulation_dtype


@contextmanager
def _hooks_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of `Tensor.register_hook` see the whole gradient when autograd receives it, not that of each chunk too."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


class GradientSums:
    """Parameter gradients of one layer, added up over its chunks in fp32 (float64 for float64)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[int, Tensor] = {}
        self._own: set[int] = set()  # sums nobody else holds: autograd may hand out a gradient that is shared

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        d_outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """Gradients of `inputs` (None where unused); those of the parameters are added to the sums."""
        with _hooks_aside(self._parameters):
            grads = torch.autograd.grad(
                outputs, [*inputs, *self._parameters], d_outputs, retain_graph=retain_graph, allow_unused=True
            )
        for parameter, grad in zip(self._parameters, grads[len(inputs) :], strict=True):
            if grad is not None:
                self._add(id(parameter), grad)
        return list(grads[: len(inputs)])

    def check_complete(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Raise RuntimeError where `outputs` depend on a leaf that is neither an input nor one of the parameters."""
        known = {id(leaf) for leaf in (*inputs, *self._parameters)}
        nodes: list[Any] = [output.grad_fn for output in outputs]
        seen: set[Any] = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [source for source, _ in node.next_functions]
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise RuntimeError(
                    f"hf_fpdt: a layer or the head computes with a tensor of shape {tuple(leaf.shape)} that wants a "
                    "gradient and is no parameter of it (a forward hook's?), so its gradient would be lost: make it a "
                    "parameter of one of the modules there."
                )

    def _add(self, key: int, grad: Tensor) -> None:
        total = self._sums.get(key)
        wide = accumulation_dtype(grad.dtype)
        if total is None:
            self._sums[key] = grad.to(wide)
            if grad.dtype != wide:
                self._own.add(key)
        elif key in self._own:
            total.add_(grad)
        else:
            self._sums[key] = total + grad
            self._own.add(key)

    def totals(self, factor: Tensor | None = None) -> dict[int, Tensor]:
        """Gradient by id of its parameter, times `factor`, rounded once to the parameter's dtype; the sums are gone.

        Parameters that no chunk used are absent.
        """
        return {id(p): self._total(p, factor) for p in self._parameters if id(p) in self._sums}

    def _total(self, parameter: Tensor, factor: Tensor | None) -> Tensor:
        # One by one, so that there are no two sums of everything.
        total = self._sums.pop(id(parameter))
        if factor is not None:
            total = total.mul_(factor) if id(parameter) in self._own else total * factor
        return total.to(parameter.dtype)


def mean_size(grad: Tensor) -> float:
    """Root mean square of its elements."""
    return norm_of(grad) / max(1, grad.numel()) ** 0.5


def norm_of(grad: Tensor) -> float:
    """Without a wide copy: experts' gradients have gigabytes."""
    return float(torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)))
