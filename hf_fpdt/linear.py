"""Linear layers of a decoder layer: LoRA without passes over memory of its own, and products nobody reads left out.

PEFT computes W x, then B A x, scales it and adds it: three more tensors of the output's size, each written and read
again, forward and backward. Here the matrix product that forms B A x scales it and adds it where W x lies.

A layer is replayed for the sake of its graph, not of its output, so the value of its last product (an MLP's
down-projection, a quarter of the layer's weights) is read by nobody: backward needs its factors alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .patch import Settings, is_patched, patch
from .run import current_call


def patch_linear(module: nn.Module, settings: Settings, *, unread: bool) -> None:
    """Patch a PEFT LoRA linear; with `unread`, whose value nothing in its layer reads but sums, any linear."""
    if is_patched(module):
        return
    if _is_lora(module):
        patch(module, _unread_lora_forward if unread else _lora_forward, settings)
    elif unread and type(module) is nn.Linear:
        patch(module, _unread_forward, settings)


def _is_lora(module: nn.Module) -> bool:
    peft_layers = sys.modules.get("peft.tuners.lora.layer")  # where no model has adapters, peft need not be loaded
    return peft_layers is not None and type(module) is peft_layers.Linear


def _is_unread() -> bool:
    call = current_call()
    return call is not None and call.rest_is_unread


def _unread_forward(self: Any, x: Tensor) -> Tensor:
    if not _is_unread() or _hooked(self):
        return self._fpdt.forward(x)
    x, weight, *bias = _in_autocast_dtype(x, self.weight, *_present(self.bias))
    return _UnreadLinear.apply(x, weight, *bias)


def _unread_lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _lora(self, x, _is_unread() and not _hooked(self), *args, **kwargs)


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _lora(self, x, False, *args, **kwargs)


def _lora(layer: Any, x: Tensor, unread: bool, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _only_adapter(layer)
    if name is None:
        return layer._fpdt.forward(x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    tensors = _in_autocast_dtype(x, base.weight, down.weight, up.weight, *_present(base.bias))
    if len({tensor.dtype for tensor in tensors}) > 1:
        return layer._fpdt.forward(x)  # PEFT computes wider adapters in their own dtype
    dropout, (x, *weights) = layer.lora_dropout[name], tensors
    active = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    return _LoRALinear.apply(layer.scaling[name], unread, x, dropout(x) if active else None, *weights)


def _only_adapter(layer: Any) -> str | None:
    """The one plain adapter that acts, if that is all that acts: frozen base, no variant, no hooks, not merged."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[active[0]], layer.lora_B[active[0]]
    plain = all(type(part) is nn.Linear and not _hooked(part) for part in (base, down, up))
    if not plain or up.bias is not None or any(p.requires_grad for p in base.parameters()):
        return None
    return active[0] if isinstance(layer.lora_dropout[active[0]], (nn.Dropout, nn.Identity)) else None


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _present(bias: Tensor | None) -> list[Tensor]:
    return [] if bias is None else [bias]


def _in_autocast_dtype(x: Tensor, *others: Tensor) -> list[Tensor]:
    """The factors as a linear under autocast would take them."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *others]
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x, *others)]


class _LoRALinear(torch.autograd.Function):
    """x W' + bias + scaling · x_adapter A' B' for a frozen W; `x_adapter` is x after dropout, None without."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, unread: bool, x: Tensor, x_adapter: Tensor | None, *weights: Tensor
    ) -> Tensor:
        weight, down, up, *bias = weights
        inner = linear(x if x_adapter is None else x_adapter, down)
        ctx.scaling, ctx.dropped = scaling, x_adapter is not None
        ctx.save_for_backward(x if x_adapter is None else x_adapter, inner, weight, down, up)
        if unread:
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        y = linear(x, weight, *bias)
        y.view(-1, y.shape[-1]).addmm_(inner.flatten(0, -2), up.t(), alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | float | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        dy_TO, x_TI = dy.flatten(0, -2), x.flatten(0, -2)
        d_inner = (dy_TO @ up).mul_(ctx.scaling)
        d_up = (dy_TO.t() @ inner.flatten(0, -2)).mul_(ctx.scaling)
        dx, dx_adapter = None, None
        if ctx.needs_input_grad[2]:
            dx = dy_TO @ weight
            dx = (dx if ctx.dropped else dx.addmm_(d_inner, down)).view(x.shape)
        if ctx.dropped and ctx.needs_input_grad[3]:
            dx_adapter = (d_inner @ down).view(x.shape)
        return None, None, dx, dx_adapter, None, d_inner.t() @ x_TI, d_up, *(None,) * (len(ctx.needs_input_grad) - 7)


class _UnreadLinear(torch.autograd.Function):
    """The graph of a linear, its output never computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        needs_x, needs_weight, *needs_bias = ctx.needs_input_grad
        dx = (dy_TO @ weight).view(x.shape) if needs_x else None
        d_weight = dy_TO.t() @ x.flatten(0, -2) if needs_weight else None
        return dx, d_weight, *(dy_TO.sum(0) if needed else None for needed in needs_bias)
