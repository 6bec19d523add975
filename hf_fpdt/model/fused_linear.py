"""Linear layers of a decoder layer: LoRA without passes over memory of its own, products nobody needs left out.

PEFT computes W x, then B A x, scales it and adds it: three more tensors of the output's size, each written and read
again, forward and backward. Here the matrix product that forms B A x scales it and adds it where W x lies.

A layer is replayed for the sake of its graph, not of its output, so the value of its last product (an MLP's
down-projection, a quarter of the layer's weights) is read by nobody: backward needs its factors alone. Nor is q, where
only K and V are made again, nor are q, k, v, where an attention output was kept.

And where the output of a linear was kept from the forward pass, the replay has it: its node in the graph is that of
the linear, which needs the factors, and nothing is multiplied.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..engine import current_call, hooks_everywhere, hooks_of
from .patch import is_patched, patch
from .settings import Settings
from .weights.quantised import is_quantised, is_whole, whole_product

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputUse:
    """What becomes of a linear's output.

    Attributes:
        names: what it is, as in `AttentionCall.unread`: nobody reads it where all of them are unread.
        readers: the modules it passes through, its own first; a hook on one of them may look.
    """

    names: frozenset[str]
    readers: tuple[nn.Module, ...]

    @property
    def unread(self) -> bool:
        """Whether nothing looks at it now."""
        call = current_call()
        if call is None or not self.names <= call.unread:
            return False
        return not (hooks_everywhere() or any(map(hooks_of, self.readers)))


def patch_linear(
    module: nn.Module, settings: Settings, layer: int = 0, value: OutputUse | None = None, entry: str | None = None
) -> None:
    """Patch a PEFT LoRA linear; and any linear of whose output it is known what becomes of it, or that may be kept.

    Again it says what that is now: a linear may have become the base of a wrapper, which reads all of it.

    Args:
        layer: the place of the layer whose module it is; of each that has it what follows is another.
        entry: the name under which the output may be kept.
    """
    if not is_patched(module):
        forward = _forward_of(module, settings, is_known=value is not None or entry is not None)
        if forward is not None:
            patch(module, forward, settings)
    if is_patched(module):
        patched: Any = module
        patched._fpdt.values[layer], patched._fpdt.entries[layer] = value, entry


def _forward_of(module: nn.Module, settings: Settings, *, is_known: bool) -> Callable[..., Tensor] | None:
    """Ours of a LoRA linear, and of a linear of which something is known; None: the module keeps its own."""
    if is_plain_lora(module) and settings.plugin.fused:
        return _lora_forward
    # A forward that was put on the instance (by accelerate, …) may compute something else.
    if not is_known or "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return _linear_forward
    return _quantised_forward if is_quantised(module) else None


def patch_quantised(module: nn.Module, settings: Settings) -> None:
    """Patch a linear of bitsandbytes, so that it takes its weight as it is now, packed or whole."""
    if not is_patched(module):
        patch(module, _quantised_forward, settings)


def is_plain_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA around a linear, or around one of bitsandbytes."""
    peft_layers, peft_quantised = _peft_layers(), sys.modules.get("peft.tuners.lora.bnb")
    if peft_layers is None:
        return False
    names = ("Linear4bit", "Linear8bitLt")  # there is each only where bitsandbytes can do it
    kinds = [getattr(peft_quantised, name, None) for name in names]
    return type(module) in (peft_layers.Linear, *kinds)


def is_lora(module: nn.Module) -> bool:
    """Whether it is one of PEFT's LoRA layers, around a quantised linear too."""
    peft_layers = _peft_layers()
    return peft_layers is not None and isinstance(module, peft_layers.LoraLayer)


def _peft_layers() -> Any:
    """PEFT's module of LoRA layers, if it is loaded: where it is not, no model has any."""
    return sys.modules.get("peft.tuners.lora.layer")


def is_unread(module: Any) -> bool:
    """Whether nobody reads what a patched module gives in the layer that runs now."""
    call = current_call()
    value: OutputUse | None = None if call is None else module._fpdt.values.get(call.layer)
    return value is not None and value.unread and not _is_compared()


def _is_compared() -> bool:
    """Whether what autograd saves is hooked: checkpoints inside of a layer compare it with that of a second run."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    return _linear_output(self, x, self._fpdt.forward)


def _quantised_forward(self: Any, x: Tensor) -> Tensor:
    if not is_whole(self):
        return self._fpdt.forward(x)
    return _linear_output(self, x, functools.partial(whole_product, self))


def _linear_output(module: Any, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """What a linear gives: computed by `product`, or of the forward pass, or not computed as nobody reads it."""
    unread = is_unread(module)
    kept = None if unread else kept_output(module, x.shape[:-1])
    if not unread and kept is None:
        y = product(x)
        keep_output(module, y)
        return y
    if kept is not None and not torch.is_grad_enabled():
        return kept
    x, weight, *bias = _in_dtype_of_product(x, module.weight, *_present(module.bias))
    if kept is not None:
        # A quantised linear computes in its weight's dtype, and gives that of its input: both casts are exact.
        return _KeptLinear.apply((kept.to(x.dtype),), x, weight, *bias).to(kept.dtype)
    return _UnreadLinear.apply(x, weight, *bias) if torch.is_grad_enabled() else _unwritten(x, weight)


def _in_dtype_of_product(x: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
    """The factors as a linear takes them: in autocast's dtype, or in the weight's."""
    if torch.is_autocast_enabled(x.device.type):
        return _in_autocast_dtype(x, weight, *bias)
    return [tensor.to(weight.dtype) for tensor in (x, weight, *bias)]


def kept_output(module: Any, rows: torch.Size) -> Tensor | None:
    """What a patched module gave for so many rows of the same tokens in the forward pass, if that was kept."""
    call, entry = current_call(), entry_of(module)
    kept = None if call is None or entry is None or _is_compared() else call.kept_output(entry)
    return None if kept is None or kept.shape[:-1] != rows else kept


def kept_stamp(module: Any) -> Tensor | None:
    """What was said of that output."""
    call, entry = current_call(), entry_of(module)
    return None if call is None or entry is None else call.kept_stamp(entry)


def entry_of(module: Any) -> str | None:
    """The name under which the layer that runs now may keep the module's output."""
    call = current_call()
    return None if call is None else module._fpdt.entries.get(call.layer)


def keep_output(module: Any, y: Tensor, stamp: Callable[[], Tensor] | None = None) -> None:
    """Hand the output of a patched module over, if it is to be kept; `stamp` says something of it, a small tensor."""
    call, entry = current_call(), entry_of(module)
    if call is not None and entry is not None:
        call.keep_output(entry, y, stamp)


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _only_adapter(self)
    if name is None:
        return self._fpdt.forward(x, *args, **kwargs)
    base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
    tensors = _in_autocast_dtype(x, base.weight, down.weight, up.weight, *_present(base.bias))
    if len({tensor.dtype for tensor in tensors}) > 1:
        _say_not_fused(down.weight.dtype, x.dtype, base.weight.dtype if is_quantised(base) else x.dtype)
        return self._fpdt.forward(x)  # PEFT computes wider adapters in their own dtype
    dropout, (x, *weights) = self.lora_dropout[name], tensors
    active = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    x_adapter = dropout(x) if active else None  # drawn whether or not it is used: what follows draws after it
    unread = is_unread(self)
    kept = None if unread else kept_output(self, x.shape[:-1])
    if (unread or kept is not None) and not torch.is_grad_enabled():
        return _unwritten(x, weights[0]) if kept is None else kept
    given = (_unwritten(x, weights[0]),) if unread else () if kept is None else (kept,)
    y: Tensor = _LoRALinear.apply(self.scaling[name], given, x, x_adapter, *weights)
    if not given:
        keep_output(self, y)
    return y


@functools.cache
def _say_not_fused(adapters: torch.dtype, inputs: torch.dtype, quantised: torch.dtype) -> None:
    """Once for each case; of a quantised base it also takes the dtype that its products are in."""
    base, way = "", "make them with get_peft_model(..., autocast_adapter_dtype=False)"
    if quantised != inputs:
        base, way = f", quantised weights compute in {quantised}", f"load them with bnb_4bit_compute_dtype={inputs}"
    logger.warning(
        "hf_fpdt: adapters are %s, a layer's input is %s%s, so PEFT's own slower code runs in place of fused LoRA: "
        "train with bf16=True (autocast), or %s.",
        *(str(part).replace("torch.", "") for part in (adapters, inputs, base, way)),
    )


def _unwritten(x: Tensor, weight: Tensor) -> Tensor:
    """A tensor for the value of a linear that nobody reads."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _only_adapter(layer: Any) -> str | None:
    """The one plain adapter that acts, if that is all that acts: frozen base, no variant, no hooks, not merged."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[active[0]], layer.lora_B[active[0]]
    plain = all(_is_linear(part) and not hooks_of(part) for part in (base, down, up))
    if not plain or up.bias is not None or any(p.requires_grad for p in base.parameters()):
        return None
    return active[0] if isinstance(layer.lora_dropout[active[0]], (nn.Dropout, nn.Identity)) else None


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear, its weight whole now."""
    return type(module) is nn.Linear or is_whole(module)


def may_be_kept(module: nn.Module) -> bool:
    """Whether it is a linear, or PEFT's layer around one, whose output `patch_linear` can keep."""
    base = getattr(module, "base_layer", module)
    return type(base) is nn.Linear or is_quantised(base)


def _present(bias: Tensor | None) -> list[Tensor]:
    return [] if bias is None else [bias]


def _in_autocast_dtype(x: Tensor, *others: Tensor) -> list[Tensor]:
    """The factors as a linear under autocast would take them."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *others]
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x, *others)]


class _LoRALinear(torch.autograd.Function):
    """x W' + bias + scaling · x_adapter A' B' for a frozen W; `x_adapter` is x after dropout, None without.

    `given` has the output where it need not be computed, in a tuple: autograd would make a view of a node's input.
    """

    @staticmethod
    def forward(
        ctx: Any, scaling: float, given: tuple[Tensor, ...], x: Tensor, x_adapter: Tensor | None, *weights: Tensor
    ) -> Tensor:
        weight, down, up, *bias = weights
        inner = linear(x if x_adapter is None else x_adapter, down)
        ctx.scaling, ctx.dropped = scaling, x_adapter is not None
        ctx.save_for_backward(x if x_adapter is None else x_adapter, inner, weight, down, up)
        if given:
            return given[0]
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
        return _unwritten(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _linear_gradients(dy, x, weight, ctx.needs_input_grad)


class _KeptLinear(torch.autograd.Function):
    """The graph of a linear whose output is given, in a tuple: autograd would make a view of a node's input."""

    @staticmethod
    def forward(ctx: Any, given: tuple[Tensor], x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return given[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return None, *_linear_gradients(dy, x, weight, ctx.needs_input_grad[1:])


def _linear_gradients(dy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias, as PyTorch makes them."""
    dy_TO = dy.flatten(0, -2)
    needs_x, needs_weight, *needs_bias = needed
    dx = (dy_TO @ weight).view(x.shape) if needs_x else None
    d_weight = dy_TO.t() @ x.flatten(0, -2) if needs_weight else None
    return dx, d_weight, *(dy_TO.sum(0) if needed else None for needed in needs_bias)
