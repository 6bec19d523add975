"""A plan as programs read it, and a model's sizes from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .fit import Fit, Training, Weights
from .layers import decoder_layers
from .memory import ModelSizes
from .optimizers import parameter_count
from .patch import AUTO_CHUNK_TOKENS_GPU, auto_loss_tokens
from .shapes import build_random, with_lora


def training_of(config: PreTrainedConfig, *, lora: bool) -> Training:
    """Sizes of a model with this configuration; it is built without memory for its weights, to count them."""
    return training_of_model(build_random(config, "meta", torch.bfloat16, False), lora=lora)


def training_of_model(model: PreTrainedModel, *, lora: bool) -> Training:
    """Sizes of a model; with `lora` its adapters are put into it, and what they train is counted."""
    if lora:
        with_lora(model)
    layers = decoder_layers(model)
    inside = [list(layer.parameters()) for layer in layers]
    total, trained = parameter_count(model.parameters()), parameter_count(model.parameters(), trained=True)
    in_layers = [parameter_count(parameters, trained=True) for parameters in inside]
    text = model.config.get_text_config()
    largest = max(map(parameter_count, inside))
    return Training(
        model=ModelSizes.of(text, layers=len(layers), layer_parameters=largest),
        weights=Weights(
            total=total,
            trained=trained,
            largest_trained=max(trained - sum(in_layers), *in_layers),
            outside=total - sum(map(parameter_count, inside)),
        ),
        vocabulary=text.vocab_size,
        chunk_tokens=AUTO_CHUNK_TOKENS_GPU,
        loss_tokens=auto_loss_tokens(text.vocab_size),
    )


def as_json(found: Fit, helps: Mapping[str, int], least: Fit | None = None) -> dict[str, Any]:
    """Numbers, in bytes and seconds; `least` is the step with the least host memory."""
    kept, kv, told = found.plan.kept, found.plan.kv, found.plan.foretold
    assert told is not None
    return {
        "tokens": found.step.plan.n_tokens,
        "sp_size": found.step.plan.sp_size,
        "chunk_tokens": found.step.plan.chunk_tokens,
        "seconds": found.seconds,
        "tokens_per_s": found.step.plan.n_tokens / found.seconds,
        "strict_mfu": found.strict_mfu,
        "copy_seconds": found.copy_seconds,
        "exchange_seconds": found.exchange_seconds,
        "gather_seconds": found.gather_seconds,
        "device_bytes": dict(found.device),
        "peak_device_bytes": found.peak,
        "host_bytes": found.host,
        "disk_bytes": told.disk_bytes * found.step.plan.sp_size,
        "inputs_kept": kept.inputs.count(True),
        "attention_outputs_kept": kept.attentions.count(True),
        "layers": kept.layers,
        "resident_chunks": kv.backward_resident,
        "longest_with": dict(helps),
        **({} if least is None else {"least_host_bytes": least.host, "seconds_with_least": least.seconds}),
    }
