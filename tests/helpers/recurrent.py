"""Tiny models with recurrent layers: gated delta net, KDA, Mamba-2, short convolutions; and what may break in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import hf_fpdt.engine.layer
import hf_fpdt.engine.layer_run
from hf_fpdt.engine.recurrent import StandInCache
from tests.helpers.models import tiny

Config = dict[str, Any]
_TYPES: Config = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: Config = {
    **_TYPES, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_EXPERTS: Config = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "experts_implementation": "eager",
}  # fmt: skip
_MAMBA: Config = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
_FAMILIES: Mapping[str, Config] = {
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS},
    "olmo_hybrid": {**_DELTA, "num_key_value_heads": 2},
    "kimi_linear": {
        **_TYPES, "linear_head_dim": 8, "linear_num_heads": 3, "linear_conv_kernel_dim": 4,
        "mlp_layer_types": ["dense", "dense"], "num_key_value_heads": 4,
    },
    "bamba": {**_MAMBA, "mamba_expand": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_MAMBA, **_TYPES, "mamba_expand": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16, "experts_implementation": "eager",
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16, "num_key_value_heads": 2, "head_dim": 8,
        "num_hidden_layers": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "experts_implementation": "eager",
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16, "expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_key_value_heads": 2},
}  # fmt: skip
# Not every release of transformers that is served has all of them.
FAMILIES = {name: config for name, config in _FAMILIES.items() if name in CONFIG_MAPPING}


def recurrent(name: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A float64 model of the family in training mode whose states live for many chunks."""
    config = {**FAMILIES[name], **changes}
    experts = config.pop("experts_implementation", None)
    torch.manual_seed(0)  # biases and the like
    model = tiny(name, attention=attention, **config)
    if experts is not None:
        model.set_experts_implementation(experts)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("A_log"):
                weight.normal_(-3.0, 0.3, generator=generator)
            elif key.endswith("dt_bias"):
                weight.normal_(-2.0, 0.3, generator=generator)
    return model


class Forgets(StandInCache):
    """Every chunk begins anew."""

    def __init__(self, before: int, states: Any = None, **options: Any) -> None:
        super().__init__(before, {name: torch.zeros_like(state) for name, state in (states or {}).items()}, **options)


class CutOff(StandInCache):
    """Gradients of states are lost."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state = super().get_conv_state(layer_idx, state_idx)
        return None if state is None else state.detach()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state = super().get_recurrent_state(layer_idx, state_idx)
        return None if state is None else state.detach()


class Shifted(StandInCache):
    """A convolution gets the inputs before one token too early."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        state = super().get_conv_state(layer_idx, state_idx)
        return None if state is None else state.roll(1, -1)


class Rounded(StandInCache):
    """States of scans are kept in bfloat16."""

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        rounded = new + (new.bfloat16().to(new.dtype) - new).detach()
        return super().update_recurrent_state(rounded, layer_idx, state_idx, **options)


@contextmanager
def cache(kind: type[StandInCache]) -> Iterator[None]:
    """Inside, chunks of layers get this in place of their cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.engine.layer_run, "StandInCache", kind)
        yield


@contextmanager
def states_of_another_chunk() -> Iterator[None]:
    """Inside, backward finds the states that the chunk before began with."""
    right = hf_fpdt.engine.layer._keep_states

    def wrong(run: Any, chunk: Any, stand_in: Any) -> dict[str, Tensor]:
        states = right(run, chunk, stand_in)
        if run.checkpoint is not None and chunk is not run.plan.chunks[-1] and chunk.index > 0:
            later = run.plan.chunks[chunk.index + 1]
            for name in states:
                run.checkpoint.take(name, later)
                run.checkpoint.put(name, later, run.checkpoint.peek(name, chunk).clone())
        return states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.engine.layer, "_keep_states", wrong)
        yield
