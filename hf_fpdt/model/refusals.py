"""Which models FPDT serves, decided from the model alone before any step. Every reason is found, not the first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from ..plan import by_layer, why_no_sizes

# Wrappers that would run around our layers, by class name: importing them would pull in the distributed package.
_REFUSED_WRAPPERS = (
    ("FullyShardedDataParallel", "FSDP version 1 is not supported; use FSDP2 (fsdp_version: 2)"),
    (
        "CheckpointWrapper",
        "FSDP's activation checkpointing would keep and recompute everything twice; switch it off "
        "(fsdp_activation_checkpointing: false)",
    ),
)


# What `config.layer_types` may call layers that attention alone mixes tokens in, each in its own reach.
_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Those that may carry a state from token to token, attend beside it, or do neither. A trial of each layer says whether
# its state is all that a chunk needs of the ones before.
_RECURRENT_KINDS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "moe", "mlp"})
# Kinds of PEFT's layers, by the name of their package, that need the whole sequence or a whole forward pass.
_SEQUENCE_TUNERS = ("lily", "poly")
# What configurations, and a few modules, call the dropout of attention's weights.
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Transformers takes the frequencies of these from the largest position that it is given.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def why_unsupported(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    """Reasons why exact training of this model in chunks is not served, each with the way out; [] if it is.

    Args:
        model: a transformers model, not wrapped.
        layers: its decoder layers.
    """
    try:
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    except ValueError as error:
        return [f"it has not one text model ({str(error).partition('. ')[0]}); apply FPDT to the one that trains"]
    return [
        *_registry_reasons(model, layers),
        *_config_reasons(config),
        *_attention_reasons(config, layers),
        *why_no_sizes(config),
        *_wrapper_reasons(model, layers),
        *_adapter_reasons(layers),
    ]


def why_not_shared(model: Any) -> list[str]:
    """Reasons why ranks that hold a part of the sequence each would compute something else than one process; or []."""
    reasons = []
    if kinds := sorted(_rope_kinds(model.config.get_text_config()) & _ROPE_BY_LENGTH):
        reasons.append(
            f"its rotary embedding ({', '.join(kinds)}) takes its frequencies from how long the sequence is, of which "
            "a rank sees a part"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reasons.append("it takes no position_ids, by which a rank's part of a sequence is known")
    if model.base_model is not model and model.get_output_embeddings() is None:
        reasons.append("labels are shifted to the next token before they are cut, and its head is no language model's")
    return reasons


def homes_of(forward: Any) -> set[str]:
    """The modules that a bound function's code and its name are of: `functools.wraps` gives it another's name."""
    while isinstance(forward, functools.partial):
        forward = forward.func
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return {str(code), str(getattr(function, "__module__", code))}


def check_adapters(layer: nn.Module, name: str) -> None:
    """Raise NotImplementedError where PEFT's adapters in a layer look at more tokens than one."""
    if reasons := _adapter_reasons([layer]):
        raise NotImplementedError(f"hf_fpdt: {name} cannot be run in chunks: {'; '.join(reasons)}.")


def _registry_reasons(model: Any, layers: Sequence[nn.Module]) -> list[str]:
    if not layers:
        return [
            "no stack of decoder layers was found; FPDT drives models built on transformers' "
            "GradientCheckpointingLayer"
        ]
    if not type(model)._can_set_attn_implementation():
        return ["its class ignores the attention registry, so FPDT's attention would never be called"]
    return []


def _config_reasons(config: Any) -> list[str]:
    other_kinds = sorted(set(getattr(config, "layer_types", None) or ()) - _KINDS - _RECURRENT_KINDS)
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not causal throughout")
    if other_kinds:
        kinds = ", ".join(other_kinds)
        reasons.append(f"layers of type {kinds} are no attention in full, windows or blocks (config.layer_types)")
    if any(by_layer(config, "num_kv_shared_layers")):
        reasons.append("some of its layers take keys and values from another layer (config.num_kv_shared_layers)")
    return reasons


def _attention_reasons(config: Any, layers: Sequence[nn.Module]) -> list[str]:
    modules = [module for layer in layers for module in layer.modules()]
    reasons = []
    if any(getattr(m, "is_causal", True) is False for m in (config, *modules)):
        reasons.append("its attention is not causal")
    if dropout := [name for name in ATTENTION_DROPOUTS if _draws(name, config, modules)]:
        settings = ", ".join(f"{name}=0.0" for name in dropout)
        reasons.append(f"attention dropout is not supported; load the model with {settings}")
    return reasons


def _draws(dropout: str, config: Any, modules: Sequence[nn.Module]) -> bool:
    values = [*by_layer(config, dropout), *(getattr(module, dropout, 0.0) for module in modules)]
    return any(isinstance(p, (int, float)) and p > 0 for p in values)


def _rope_kinds(config: Any) -> set[Any]:
    """Of the model, or of each type of its layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type") for each in (parameters, *nested)}


def _adapter_reasons(layers: Sequence[nn.Module]) -> list[str]:
    reasons = set()
    for module in (module for layer in layers for module in layer.modules()):
        package = type(module).__module__
        if not package.startswith("peft.tuners."):
            continue
        kind = package.split(".")[2]
        if kind in _SEQUENCE_TUNERS:
            reasons.add(f"PEFT's adapters of type {kind} look at all tokens of a sequence")
        variants = vars(module).get("lora_variant", {}).values()
        if any(type(variant).__name__ == "ALoraLinearVariant" for variant in variants):
            reasons.add("activated LoRA (aLoRA) looks for its tokens in the whole sequence")
    return sorted(reasons)


def _wrapper_reasons(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    names = {type(module).__name__ for module in model.modules()}
    reasons = [reason for name, reason in _REFUSED_WRAPPERS if name in names]
    if any("forward" in vars(layer) for layer in layers):
        reasons.append(
            "the forward of its layers was replaced on the instance (accelerate's hooks for a device_map of several "
            "devices or for offloading), so FPDT's would not be called; load the model on one device"
        )
    if any(home.startswith("liger_kernel") for home in homes_of(model.forward)):
        reasons.append(
            "Liger's fused loss replaces the model's forward; apply Liger with fused_linear_cross_entropy=False, "
            "FPDT's own loss never builds the logits either"
        )
    return reasons


# Of the loss's parameters those that are heard here, and those that the model's forward fills.
_HEARD = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")
_FILLED = ("logits", "vocab_size", "source", "input", "target", "kwargs")


@functools.cache
def _unheard_parameters() -> Mapping[str, Any]:
    """Defaults of what a cross-entropy may be asked for, by name, and ours is not."""
    losses = (functional.cross_entropy, fixed_cross_entropy, ForCausalLMLoss)
    parameters = [p for loss in losses for p in inspect.signature(loss).parameters.values()]
    return MappingProxyType({p.name: p.default for p in parameters if p.name not in (*_HEARD, *_FILLED)})


def check_loss_arguments(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for what only a loss function would hear of a call, and the one in chunks does not.

    A model's forward hands on to its loss function what it does not know itself.
    """
    unheard = [
        name
        for name, default in _unheard_parameters().items()
        if (value := arguments.get(name, default)) is not default and (isinstance(value, Tensor) or value != default)
    ]
    if unheard:
        raise NotImplementedError(
            f"hf_fpdt: the loss in chunks does not take {', '.join(unheard)}, only {', '.join(_HEARD)}: leave it out "
            "(transformers' own loss may ignore it in silence), or call the model without labels and compute the loss "
            "from its logits, which are whole then (tokens x vocabulary)."
        )
