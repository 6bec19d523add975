"""`--quantize`: the base in 4 or 8 bits under adapters; what cannot be, and what is said of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...model import bitsandbytes_config, check_quantised_here, expert_weights, quantised_bytes
from ...units import GIB
from ..options import UserMistake, mistakes
from .options import Options
from .trainer_options import autocast_dtype

NONE = "none"
QUANTISED = "quantization_config"


def is_quantised(quantize: str, config: PreTrainedConfig) -> bool:
    """Whether a model is loaded in few bits: because it was asked for, or saved so."""
    return quantize != NONE or getattr(config, QUANTISED, None) is not None


def check_quantised(quantize: str, name: str, config: PreTrainedConfig) -> None:
    """Refuse before weights are read what cannot be loaded so here."""
    if quantize != NONE and getattr(config, QUANTISED, None) is not None:
        raise UserMistake(f"--quantize {quantize}: the weights of {name} are quantised already; leave --quantize out")
    if is_quantised(quantize, config):
        with mistakes(ImportError):
            check_quantised_here()


def check_quantize(options: Options, config: PreTrainedConfig) -> None:
    """The same of what cannot be trained so, and of weights that are to wait on the host."""
    check_quantised(options.quantize, options.model, config)
    if options.plugin.host_weights and options.full:
        raise UserMistake("--host_weights: --full trains every weight, and those stay on the GPU; leave one out")
    if not is_quantised(options.quantize, config):
        return
    asked = f"--quantize {options.quantize}" if options.quantize != NONE else f"--model: {options.model} is quantised"
    if options.full:
        raise UserMistake(f"{asked}: --full trains every weight, and quantised ones cannot; leave one of them out")
    if options.trainer.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise UserMistake(f"{asked}: FSDP cannot shard such weights; without it each GPU has all of them")


def compute_dtype(options: Options) -> torch.dtype:
    """Of products with quantised weights."""
    return autocast_dtype(options.trainer) or options.torch_dtype


def loading(quantize: str, config: PreTrainedConfig, compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How `from_pretrained` is told; it quantises where the weights are to lie, a matrix at a time. {}: not at all.

    Args:
        quantize: what was asked for.
        config: the model's own.
        compute: dtype of products with 4 bits.
        device: where the weights are to lie.
    """
    if not is_quantised(quantize, config):
        return {}
    where = {"device_map": {"": device}}
    return where if quantize == NONE else {**where, QUANTISED: bitsandbytes_config(quantize, compute)}


def to_device_but_for_layers(model: Any, device: torch.device) -> None:
    """Move what does not wait on the host; accelerate is told that this is where the model is."""
    model.to(device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "hf_device_map", None) is not None:
        base.hf_device_map = {"": device}


def plain_config(config: PreTrainedConfig, quantize: str) -> PreTrainedConfig:
    """To be kept with an adapter: it goes with the base, which is not saved in few bits where that was asked for."""
    if quantize == NONE:
        return config
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def quantised_lines(model: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """What was quantised, and what was not though it is large."""
    count, nbytes = quantised_bytes(model)
    if not count:
        return
    yield f"{count:,} weights are quantised, {nbytes / GIB:.2f} GiB, {8 * nbytes / count:.3f} bits a weight"
    if experts := expert_weights(model):
        yield (
            f"{experts:,} weights are experts that the model holds as one parameter; bitsandbytes quantises linears "
            f"alone, so they stay in {str(dtype).removeprefix('torch.')}"
        )
