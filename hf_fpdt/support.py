"""Which models FPDT serves, decided from the model alone before any step. Every reason is found, not the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

# Wrappers that would run around our layers, by class name: importing them would pull in the distributed package.
_REFUSED_WRAPPERS = (
    ("FullyShardedDataParallel", "FSDP version 1 is not supported; use FSDP2 (fsdp_version: 2)"),
    (
        "CheckpointWrapper",
        "FSDP's activation checkpointing would keep and recompute everything twice; switch it off "
        "(fsdp_activation_checkpointing: false)",
    ),
)


def why_unsupported(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    """Reasons why exact training of this model in chunks is not served, each with the way out; [] if it is.

    Args:
        model: a transformers model, not wrapped.
        layers: its decoder layers.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return [
        *_registry_reasons(model, layers),
        *_config_reasons(config),
        *_attention_reasons(config, layers),
        *_wrapper_reasons(model, layers),
    ]


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
    other_kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not causal throughout")
    if other_kinds:
        reasons.append(f"layers of type {', '.join(other_kinds)} are not full attention (config.layer_types)")
    if getattr(config, "attn_logit_softcapping", None):
        reasons.append("attention softcap is not served by a kernel yet (config.attn_logit_softcapping)")
    if getattr(config, "output_router_logits", False):
        reasons.append("the router's auxiliary loss needs all tokens at once; set config.output_router_logits=False")
    return reasons


def _attention_reasons(config: Any, layers: Sequence[nn.Module]) -> list[str]:
    modules = [module for layer in layers for module in layer.modules()]
    # Where no module says, the config's window is passed to attention by every layer (Mistral's habit).
    windows: set[Any] = {m.sliding_window for m in modules if hasattr(m, "sliding_window")}
    # Zero means none there (Qwen2-MoE).
    window = (windows or {getattr(config, "sliding_window", None)}) - {None, 0}
    dropout = {getattr(m, "attention_dropout", 0.0) for m in modules} | {getattr(config, "attention_dropout", 0.0)}
    reasons = []
    if window:
        reasons.append(
            f"sliding-window attention (window {max(window)}) is not served by a kernel yet; if the model may attend "
            "to everything, load it with sliding_window=None"
        )
    if any(isinstance(p, (int, float)) and p > 0 for p in dropout):
        reasons.append("attention dropout is not supported; load the model with attention_dropout=0.0")
    if any(hasattr(m, "sinks") for m in modules):
        reasons.append("attention sinks are not served by a kernel yet")
    if any(getattr(m, "is_causal", True) is False for m in (config, *modules)):
        reasons.append("its attention is not causal")
    return reasons


def _wrapper_reasons(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    names = {type(module).__name__ for module in model.modules()}
    reasons = [reason for name, reason in _REFUSED_WRAPPERS if name in names]
    if any("forward" in vars(layer) for layer in layers):
        reasons.append(
            "the forward of its layers was replaced on the instance (accelerate's hooks for a device_map of several "
            "devices or for offloading), so FPDT's would not be called; load the model on one device"
        )
    forward = getattr(model.forward, "__func__", model.forward)
    if getattr(forward, "__module__", "").startswith("liger_kernel"):
        reasons.append(
            "Liger's fused loss replaces the model's forward; apply Liger with fused_linear_cross_entropy=False, "
            "FPDT's own loss never builds the logits either"
        )
    return reasons
