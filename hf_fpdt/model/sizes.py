"""Sizes of a model for the planner, from its configuration: built without memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import AUTO_CHUNK_TOKENS_GPU
from ..forecast import Training, Weights
from ..memory import parameter_count
from ..plan import ModelSizes
from .layers import decoder_layers
from .settings import auto_loss_tokens
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
