"""Which linears of a model bitsandbytes quantises, the bytes that they take then, and doing it.

The same as transformers' loader does with a `BitsAndBytesConfig`: every linear but the head, what is tied to the
embeddings, and what the model wants in fp32. Experts that are one parameter of three dimensions are no linears.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from .quantised import dequantised, is_packed, is_quantised, packed_bytes, shape_of

QUANTISED_KINDS = ("nf4", "int8")
# Weights that share a scale, scales that share one of theirs, and the tables of values of both.
BLOCK, SCALE_BLOCK = 64, 256
TABLES = (4 * 16, 4 * 256, 4)


def check_quantised_here() -> None:
    """Raise ImportError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            'hf_fpdt: quantised weights need the package bitsandbytes, which is not installed: pip install "hf_fpdt'
            '[quantized]", or leave quantisation out.'
        )


def bitsandbytes_config(kind: str, compute: torch.dtype) -> Any:
    """What `from_pretrained` takes: NF4 with double quantisation, or int8.

    Args:
        kind: one of `QUANTISED_KINDS`.
        compute: dtype of products of 4 bits.
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def quantisable(model: Any) -> dict[str, nn.Module]:
    """The linears, by name, that are quantised; the model may have no memory."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def packed_sizes(kind: str, rows: int, columns: int) -> tuple[int, ...]:
    """Bytes of a quantised matrix, of its scales, and of their tables."""
    count = rows * columns
    if kind == "int8":
        return count, 4 * rows
    scales = math.ceil(count / BLOCK)
    return math.ceil(count / 2), scales, 4 * math.ceil(scales / SCALE_BLOCK), *TABLES


def expert_weights(model: nn.Module) -> int:
    """Weights of experts that are held as one parameter of three dimensions, which stay as they are."""
    modules = (module for module in model.modules() if not isinstance(module, nn.Conv1d))
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.dim() == 3)


def quantise(model: Any, kind: str, compute: torch.dtype) -> None:
    """Quantise a model in place, one linear after the other, where they are.

    Args:
        model: a transformers model with its weights, without adapters.
        kind: one of `QUANTISED_KINDS`.
        compute: dtype of products of 4 bits.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    check_quantised_here()
    for name in list(quantisable(model)):  # a list of modules would hold all of them to the end
        model.set_submodule(name, _quantised(model.get_submodule(name), kind, compute))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    model.config.quantization_config = bitsandbytes_config(kind, compute)


def _quantised(module: Any, kind: str, compute: torch.dtype) -> Any:
    package: Any = importlib.import_module("bitsandbytes.nn")
    weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data
    weight = weight.float() if weight.dtype == torch.float64 else weight  # which bitsandbytes does not know
    rows, columns = weight.shape
    bias, device, frozen = module.bias is not None, weight.device, {"requires_grad": False}
    with torch.device("meta"):
        if kind == "nf4":
            made = package.Linear4bit(columns, rows, bias, compute, quant_type="nf4")
        else:
            made = package.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=6.0)
    if kind == "nf4":
        made.weight = package.Params4bit(weight, quant_type="nf4", module=made, **frozen).to(device)
    else:
        made.weight = package.Int8Params(weight.to("cpu"), has_fp16_weights=False, **frozen).to(device)
    if bias:
        made.bias = nn.Parameter(module.bias.data, **frozen)
    made.source_cls = type(module)
    return made.train(module.training)


def dequantise(model: Any, dtype: torch.dtype, device: torch.device | str) -> None:
    """Undo `quantise` in place, as far as its rounding goes: linears of the dequantised weights.

    Args:
        model: a transformers model, without adapters.
        dtype: of those weights.
        device: where they go.
    """
    for name in [name for name, module in model.named_modules() if is_quantised(module)]:
        model.set_submodule(name, _plain(model.get_submodule(name), dtype, device))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _plain(module: Any, dtype: torch.dtype, device: torch.device | str) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    made.weight = nn.Parameter(dequantised(module, dtype).to(device, dtype), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(device, dtype), requires_grad=False)
    return made.train(module.training)


def quantised_bytes(model: nn.Module) -> tuple[int, int]:
    """(quantised weights, the bytes that they take with their scales and tables)."""
    found: list[Any] = [module for module in model.modules() if is_quantised(module) and is_packed(module.weight)]
    return sum(shape_of(module.weight).numel() for module in found), sum(map(packed_bytes, found))


def weight_count(model: nn.Module) -> int:
    """Weights of a model; quantised ones by what they are, not by their bytes."""
    return sum(shape_of(parameter).numel() for parameter in model.parameters())


def scale_bytes(model: nn.Module) -> int:
    """Of quantised weights, what lies beside the parameters: their scales and tables."""
    found: list[Any] = [module for module in model.modules() if is_quantised(module) and is_packed(module.weight)]
    return sum(packed_bytes(module) - module.weight.numel() * module.weight.element_size() for module in found)
