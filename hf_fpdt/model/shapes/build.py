"""Models with random weights made from a configuration, and their sizes for the planner."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...config import AUTO_CHUNK_TOKENS_GPU
from ...forecast import Training, Weights
from ...memory import parameter_count
from ...plan import ModelSizes, take_layers
from ..adapters import without_adapters
from ..apply import seen_of
from ..experts.replace import experts_are_replaced
from ..layers import decoder_layers
from ..settings import auto_loss_tokens
from ..weights.counts import merged_weights
from ..weights.host import aligned
from ..weights.packing import packed_sizes, quantisable, quantise

LORA_RANK = 16


def with_layers(config: PreTrainedConfig, n_layers: int) -> PreTrainedConfig:
    """The configuration with its number of layers changed in place, and returned.

    They are the first ones, over again where there are not as many; but no kind of layer is left out that there is
    room for: of the kinds that are not among them the first ones are the last.
    """
    text: Any = config.get_text_config()
    layers = [i % text.num_hidden_layers for i in range(n_layers)]
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [None]
    firsts = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    missing = sorted(place for kind, place in firsts.items() if kind not in {kinds[i % len(kinds)] for i in layers})
    if len(firsts) <= n_layers and missing:
        layers[-len(missing) :] = missing
    take_layers(text, layers)
    return config


def build_random(
    config: PreTrainedConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    lora: bool,
    quantised: str | None = None,
) -> PreTrainedModel:
    """A model in training mode with the weights of a new one, made on the device: a CPU takes a minute for them.

    Args:
        config: its sizes, such as `llama_8b()` or one of `AutoConfig.from_pretrained`.
        device: where the weights are made and stay.
        dtype: of every parameter, adapters included.
        lora: train adapters of rank 16 on every linear and freeze the rest; False: train every weight.
        quantised: one of `QUANTISED_KINDS`, of the linears under the adapters; None: they are of `dtype`.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantised is not None:
        quantise(model, quantised, dtype)
    return (with_lora(model) if lora else model).train()


def with_lora(model: PreTrainedModel) -> Any:
    """The model with adapters of rank 16 on every linear, of its own dtype, and all else frozen."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT still asks by the old name of a property; nothing a user could change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # Patterns of PEFT's own for experts, which "all-linear" leaves out.
        warnings.filterwarnings("ignore", message="The following .*_pattern keys", category=RuntimeWarning)
        left_out = without_adapters(model) or None
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", exclude_modules=left_out)
        made = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in made.parameters():
        if parameter.requires_grad:  # on a quantised linear they are made in fp32
            parameter.data = parameter.data.to(model.dtype)
    return made


def training_of(config: PreTrainedConfig, *, lora: bool) -> Training:
    """Sizes of a model with this configuration; it is built without memory for its weights, to count them."""
    return training_of_model(build_random(config, "meta", torch.bfloat16, False), lora=lora)


def training_of_model(model: PreTrainedModel, *, lora: bool, quantised: str | None = None) -> Training:
    """Sizes of a model; with `lora` its adapters are put into it, and what they train is counted.

    Args:
        model: as it is without adapters, not quantised.
        lora: whether adapters train, or every weight.
        quantised: one of `QUANTISED_KINDS`: as which its linears are counted.
    """
    seen, packed = _seen_sizes(model), {} if quantised is None else _packed_shapes(model)
    layer_bytes = tuple(_layer_bytes(layer, packed, quantised) for layer in decoder_layers(model))
    if lora:
        with_lora(model)
    layers = decoder_layers(model)
    inside = [list(layer.parameters()) for layer in layers]
    total, trained = parameter_count(model.parameters()), parameter_count(model.parameters(), trained=True)
    in_layers = [parameter_count(parameters, trained=True) for parameters in inside]
    text = model.config.get_text_config()
    largest = max(map(parameter_count, inside))
    sizes = seen or ModelSizes.of(text, layers=len(layers), layer_parameters=largest)
    whole = max(sum(map(math.prod, (packed.get(id(m), (0,)) for m in layer.modules()))) for layer in layers)
    sizes = replace(
        sizes,
        layer_parameters=largest,
        merged=merged_weights(layers),
        whole_weights=whole,
        whole_itemsize=torch.bfloat16.itemsize if whole else 0,
    )
    return Training(
        model=sizes,
        weights=Weights(
            total=total,
            trained=trained,
            largest_trained=max(trained - sum(in_layers), *in_layers),
            outside=total - sum(map(parameter_count, inside)),
            packed=sum(map(math.prod, packed.values())),
            packed_bytes=sum(sum(packed_sizes(quantised or "", *shape)) for shape in packed.values()),
            layer_bytes=layer_bytes,
        ),
        vocabulary=text.vocab_size,
        chunk_tokens=AUTO_CHUNK_TOKENS_GPU,
        loss_tokens=auto_loss_tokens(text.vocab_size),
        fused_experts=experts_are_replaced(layers),
    )


def _layer_bytes(layer: Any, packed: Mapping[int, tuple[int, int]], quantised: str | None) -> int:
    """Of a layer's weights in host memory, each tensor where it is aligned; without adapters, which stay."""
    total = 0
    for module in layer.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                is_packed = name == "weight" and id(module) in packed
                sizes = packed_sizes(quantised or "", *packed[id(module)]) if is_packed else (2 * weight.numel(),)
                total += sum(map(aligned, sizes))
    return total


def _packed_shapes(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Of the matrices that are quantised, by their modules."""
    found: list[Any] = list(quantisable(model).values())
    return {id(module): (module.weight.shape[0], module.weight.shape[1]) for module in found}


def _seen_sizes(model: PreTrainedModel) -> ModelSizes | None:
    """By what its layers ask of attention; None of a model that cannot be trained, which has sizes all the same."""
    try:
        return seen_of(model)[0] if model.device.type == "meta" else None
    except NotImplementedError:
        return None
