"""Models whose linears bitsandbytes holds in 4 or 8 bits, and the same models dequantised: the truth of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_fpdt.model.weights.packing import quantise
from hf_fpdt.model.weights.quantised import dequantised, is_quantised
from tests.helpers.models import tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SCANS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": {**SCANS, "layer_types": ["linear_attention", "full_attention"]},
}


def tiny_plain(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family, not quantised."""
    model = tiny(family, dtype=dtype, **{**FAMILIES[family], **changes})
    if family == "qwen3_moe":  # torch's grouped products take no float64
        model.set_experts_implementation("eager")
    return model


def tiny_quantised(
    family: str, kind: str, dtype: torch.dtype = torch.float64, compute: torch.dtype | None = None, **changes: Any
) -> PreTrainedModel:
    """A tiny model of random weights, its linears quantised from fp32; `dtype` is of everything else.

    Args:
        compute: dtype of products of 4 bits; None: `dtype`.
    """
    model = tiny_plain(family, torch.float32, **changes)
    quantise(model, kind, dtype if compute is None else compute)
    return model.to(dtype)


def linears(model: nn.Module) -> dict[str, Any]:
    """Those that are quantised, by name."""
    return {name: module for name, module in model.named_modules() if is_quantised(module)}


def dequantised_twin(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A copy of a model without adapters whose linears are plain ones of the dequantised weights."""
    found = linears(model)
    parts = {name: dequantised(module, dtype).to(dtype) for name, module in found.items()}
    # bitsandbytes' 8-bit linears lose what they hold when they are copied.
    twin = copy.deepcopy(model, {id(module): nn.Identity() for module in found.values()})
    for name, module in found.items():
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
        plain.weight = nn.Parameter(parts[name], requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        twin.set_submodule(name, plain)
    twin.config = copy.deepcopy(model.config)
    del twin.config.quantization_config
    twin.is_loaded_in_4bit = twin.is_loaded_in_8bit = False
    return twin.train(model.training)


def counting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function, and its first argument into a list at each call."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return function(*args, **kwargs)

    return counted
