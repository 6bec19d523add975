"""Linears whose weight bitsandbytes keeps in 4 or 8 bits: what it is, dequantised, and their product with it.

Told by their classes, of a package that is only looked for where it was imported: where it was not, no model has any.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Of bitsandbytes' weights, by their classes.
_PACKED = ("Params4bit", "Int8Params")


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear of bitsandbytes, its weight packed or whole now."""
    package: Any = sys.modules.get("bitsandbytes.nn")
    return package is not None and isinstance(module, (package.Linear4bit, package.Linear8bitLt))


def is_packed(weight: Any) -> bool:
    """Whether a weight is in bitsandbytes' 4 or 8 bits: not before it was moved to a device, which quantises it."""
    if type(weight).__name__ not in _PACKED:
        return False
    return weight.dtype == torch.int8 or getattr(weight, "quant_state", None) is not None


def is_whole(module: nn.Module) -> bool:
    """Whether a linear of bitsandbytes has its dequantised weight now."""
    return is_quantised(module) and type(module._parameters["weight"]) is nn.Parameter


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, packed or not."""
    state = getattr(weight, "quant_state", None) if is_packed(weight) else None
    return weight.shape if state is None else torch.Size(state.shape)


def whole_sizes(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """`ModelSizes.whole_weights` and `.whole_itemsize`: of the layer that dequantises most."""
    most = max((list(filter(_holds_packed, layer.modules())) for layer in layers), key=_whole_count)
    types = {whole_dtype(module, torch.int8) for module in most} - {torch.int8}
    return _whole_count(most), max((each.itemsize for each in types), default=0)


def _holds_packed(module: nn.Module) -> bool:
    return is_quantised(module) and is_packed(module._parameters["weight"])


def _whole_count(modules: Sequence[Any]) -> int:
    return sum(shape_of(module.weight).numel() for module in modules)


def packed_bytes(module: nn.Module) -> int:
    """Bytes that the weight of a linear of bitsandbytes takes on its device, with its scales and their tables."""
    parts = parts_of(module, module._parameters["weight"])
    return sum(tensor.numel() * tensor.element_size() for tensor in parts)


def parts_of(module: Any, weight: Any) -> list[Tensor]:
    """The tensors that a weight is made of: itself, and of a packed one its scales and their tables."""
    if not is_packed(weight):
        return [weight.data]
    if weight.dtype == torch.int8:
        return [weight.data, _scales(module, weight)]
    _unpack_from_cpu(weight)
    state = weight.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [weight.data, state.absmax, state.code, *nested]


def with_parts(module: Any, weight: Any, parts: Sequence[Tensor], *, inplace: bool) -> Any:
    """A weight over other tensors of the same values, in the order of `parts_of`.

    Args:
        inplace: put them into the weight; else make a new one, which leaves it alone.
    """
    data, *others = parts
    if not is_packed(weight):
        if not inplace:
            return nn.Parameter(data, requires_grad=weight.requires_grad)
        weight.data = data
        return weight
    if weight.dtype == torch.int8:
        return _int8_over(module, weight, data, others[0], inplace=inplace)
    state = weight.quant_state if inplace else copy.copy(weight.quant_state)
    if state.nested:
        state.state2 = state.state2 if inplace else copy.copy(state.state2)
        state.offset, state.state2.absmax, state.state2.code = others[2:]
    state.absmax, state.code = others[:2]
    if inplace:
        weight.data = data
        return weight
    how = {name: getattr(weight, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    return type(weight)(data, requires_grad=False, quant_state=state, bnb_quantized=True, **how)


def _int8_over(module: Any, weight: Any, data: Tensor, scales: Tensor, *, inplace: bool) -> Any:
    if not inplace:
        return type(weight)(data, requires_grad=False, has_fp16_weights=False, SCB=scales)
    weight.data = data
    for holder in (weight, module.state):  # which of them has the two depends on whether it was used
        if holder.SCB is not None:
            holder.CB, holder.SCB = data, scales
    return weight


def _scales(module: Any, weight: Any) -> Tensor:
    """Of the rows of an int8 weight; its first use moves them from the weight to the module."""
    scales: Tensor = module.state.SCB if weight.SCB is None else weight.SCB
    return scales


def _unpack_from_cpu(weight: Any) -> None:
    """Undo what bitsandbytes makes of a weight that a CPU uses without gradients; as its own state_dict does."""
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes import functional

        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )


def whole_dtype(module: Any, dtype: torch.dtype) -> torch.dtype:
    """Of the dequantised weight: what the module computes in; of 8 bits, which say nothing of it, `dtype`."""
    weight = module._parameters["weight"]
    if weight.dtype == torch.int8:
        return dtype
    return module.compute_dtype or weight.quant_state.dtype


def dequantised(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a linear whose weight is packed, [out, in], a new tensor.

    Args:
        dtype: of the layer's products; see `whole_dtype`.
    """
    from bitsandbytes import functional

    weight = module._parameters["weight"]
    if weight.dtype == torch.int8:
        scales = _scales(module, weight).to(weight.device)
        return functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    _unpack_from_cpu(weight)
    return functional.dequantize_4bit(weight.data, weight.quant_state).to(whole_dtype(module, dtype))


def whole_product(module: Any, x: Tensor) -> Tensor:
    """The output of a linear of bitsandbytes whose weight is whole now, in the dtypes of its own forward.

    It computes in the weight's dtype, and gives that of `x`; under autocast both are as of any other linear.
    """
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled(x.device.type):
        return linear(x, weight, bias)
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
