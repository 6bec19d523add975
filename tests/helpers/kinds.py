"""Tiny models with windows, sinks, softcap and latent attention, and `in_double`: float64 throughout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import hf_fpdt.engine.layer_run
from hf_fpdt.commands.float64 import float64_throughout
from hf_fpdt.memory.windowed_kv import WindowedKV
from tests.helpers.models import Step, tiny, train_step

in_double = float64_throughout
Config = dict[str, Any]
WINDOW, BLOCK = 9, 10
# Of float64 where nothing is computed in fp32, from the largest of each gradient.
TOLERANCE = 1e-10

_ALTERNATING: Config = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: Config = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "experts_implementation": "eager"}
_ROUTED: Config = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT: Config = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_FAMILIES: Mapping[str, Config] = {
    "afmoe": {**_ALTERNATING, **_EXPERTS, "num_experts": 4, "num_dense_layers": 1},
    "cohere2": _ALTERNATING,
    "deepseek_v2": {**_LATENT, **_ROUTED, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "exaone4": {**_ALTERNATING, "sliding_window_pattern": 2},
    "gemma2": {**_ALTERNATING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_ALTERNATING, **_EXPERTS, "num_local_experts": 4},
    "granite_swa": _ALTERNATING,
    "llama4_text": {  # blocks in place of windows, and queries that are scaled by their place
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": BLOCK,
        "no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5,
        "num_local_experts": 4, "intermediate_size_mlp": 24,
    },
    "mimo_v2_flash": {
        **_ALTERNATING, **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 8,
        "head_dim": 12, "swa_head_dim": 12, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "mlp_layer_types": ["dense", "sparse"],
    },
    "minicpm3": _LATENT,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, **_EXPERTS},
    "olmo3": _ALTERNATING,
    "phi3": {"sliding_window": WINDOW, "resid_pdrop": 0.0},
    "phimoe": {"sliding_window": WINDOW, "num_local_experts": 4, "experts_implementation": "eager"},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": {
        **_EXPERTS, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_experts": 4,
        "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "starcoder2": {"sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "vaultgemma": {**_ALTERNATING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
}  # fmt: skip
# Not every release of transformers that is served has all of them.
FAMILIES = {name: config for name, config in _FAMILIES.items() if name in CONFIG_MAPPING}
# Draws random numbers in training mode, for tokens by their place.
EVALUATED = {"phimoe"}


def kind(name: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A float64 model of the family, its sinks something; in training mode unless that draws random numbers."""
    config = {**FAMILIES[name], **changes}
    experts = config.pop("experts_implementation", None)
    torch.manual_seed(0)  # biases and the like
    model = tiny(name, attention=attention, **config)
    if experts is not None:
        model.set_experts_implementation(experts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for sinks in sinks_of(model):
            sinks.normal_(std=2.0, generator=generator)
    return model.eval() if name in EVALUATED else model


def sinks_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "sink" in name]


def windows_of(model: PreTrainedModel) -> bool:
    """Whether some layer has one."""
    return bool(getattr(model.config, "sliding_window", None))


def with_adapters(
    model: PreTrainedModel, dropout: float = 0.0, targets: str | Sequence[str] = "all-linear"
) -> nn.Module:
    """LoRA on every linear, on gpt-oss's experts too, that does something from the first step; sinks train."""
    experts = [
        name for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj")) and p.dim() == 3
    ]
    # Linears that return more than a product.
    routers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "Router" in type(m).__name__]
    # PEFT has none for the last linear of a Mamba, whose fused kernel takes its weight past the module.
    mamba = ["out_proj"] if model.config.model_type in ("falcon_h1", "nemotron_h", "mamba2") else []
    config = LoraConfig(
        r=4,
        target_modules=targets,
        exclude_modules=[*routers, *mamba] or None,
        target_parameters=experts if not dropout and targets == "all-linear" else None,
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    for sinks in sinks_of(peft):
        sinks.requires_grad_()
    return peft


def dropped(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of which each head has lost its sink."""
    model = copy.deepcopy(model)
    for sinks in sinks_of(model):
        sinks.data.fill_(-1e4)
    return model


def broken_kinds(name: str, ids: Tensor, **changes: Any) -> dict[str, Step]:
    """Steps of reference models with the mistakes that a window or a sink invites."""
    right = kind(name, **changes)
    broken = {}
    if windows_of(right):
        for step in (-1, 1):
            broken[f"window {step:+d}"] = train_step(kind(name, **changes, sliding_window=WINDOW + step), ids)
    if getattr(right.config, "attention_chunk_size", None) and "llama4" in name:
        for step in (-1, 1):
            broken[f"block {step:+d}"] = train_step(kind(name, **changes, attention_chunk_size=BLOCK + step), ids)
        broken["places forgotten"] = train_step(kind(name, **changes, attn_temperature_tuning=False), ids)
    if sinks_of(right):
        broken["no sinks"] = train_step(dropped(right), ids)
    if getattr(right.config, "attn_logit_softcapping", None):
        broken["no softcap"] = train_step(kind(name, **changes, attn_logit_softcapping=1e6), ids)
    return broken


class Forgets(WindowedKV):
    """The first chunk of a row that reads several."""

    def _together(self, parts: list[Tensor], span: Any) -> Tensor:
        return super()._together(parts if len(parts) == 1 else [torch.zeros_like(parts[0]), *parts[1:]], span)


class Overwrites(WindowedKV):
    """The last row's gradients of a chunk in place of the sum."""

    def _add(self, chunk: Any, place: slice, grads: Any) -> None:
        self._grads.pop(chunk.index, None)
        super()._add(chunk, place, grads)


@contextmanager
def ring(kind_of_ring: type[WindowedKV]) -> Iterator[None]:
    """Inside, windowed layers have this in place of their ring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.engine.layer_run, "WindowedKV", kind_of_ring)
        yield
