"""Rotary embeddings stretched in place equal those of a model loaded with the new config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_fpdt.commands.finetune.rope import apply_rope, beyond_reach, plan_rope, pretrained_tokens, rotary_modules
from hf_fpdt.commands.options import UserMistake

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def config_of(family: str) -> PreTrainedConfig:
    return {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig}[family](**SIZES)


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(256)[None] % 64
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_in_place_equals_loading_with_the_saved_config(family: str, kind: str, tmp_path: Path) -> None:
    model = model_of(family)
    stock_logits = logits(model)
    apply_rope(model, plan_rope(model.config, kind, None, 1024))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.rope_parameters["factor"] == 8.0 and loaded.config.max_position_embeddings == 1024
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), stock_logits, atol=1e-4)  # a change that changes nothing would pass too


def test_gpt_neox_keeps_its_partial_rotation() -> None:
    model = model_of("gpt_neox")
    apply_rope(model, plan_rope(model.config, "yarn", 4.0, 512))
    (_, _, rotary), *_ = rotary_modules(model)
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert rotary.inv_freq.numel() * 2 == 64 // 2 * 0.25


def test_auto_factor_is_what_the_length_needs() -> None:
    plan = plan_rope(config_of("llama"), "yarn", None, 1024)
    assert (plan.factor, plan.after["original_max_position_embeddings"], plan.max_position_embeddings) == (
        8.0,
        128,
        1024,
    )


def test_a_larger_factor_reaches_further() -> None:
    assert plan_rope(config_of("llama"), "yarn", 16.0, 1024).max_position_embeddings == 2048


@pytest.mark.parametrize(("kind", "length"), [("none", 1024), ("yarn", 128), ("linear", 64)])
def test_nothing_changes_when_nothing_is_needed(kind: str, length: int) -> None:
    plan = plan_rope(config_of("llama"), kind, None, length)
    assert not plan.changes and plan.kind == "none"


def test_a_model_stretched_before_counts_from_its_first_length() -> None:
    config = config_of("llama")
    config.rope_parameters = plan_rope(config, "yarn", None, 512).after
    config.max_position_embeddings = 512
    plan = plan_rope(config, "yarn", None, 1024)
    assert plan.factor == 8.0 and plan.pretrained_tokens == 128


def test_another_kind_on_a_stretched_model_is_refused() -> None:
    config = config_of("llama")
    config.rope_parameters = plan_rope(config, "linear", None, 512).after
    with pytest.raises(UserMistake, match="already has rope_type 'linear'"):
        plan_rope(config, "yarn", None, 1024)


def test_a_model_with_a_set_for_each_layer_type_is_refused() -> None:
    with pytest.raises(UserMistake, match="layer type"):
        plan_rope(Gemma3TextConfig(num_hidden_layers=2), "yarn", None, 1024)


def test_windows_beyond_the_models_reach_are_warned_of() -> None:
    config = config_of("llama")

    def warning(kind: str, tokens: int) -> str | None:
        return beyond_reach(config, plan_rope(config, kind, None, tokens), tokens)

    assert warning("none", 128) is None and warning("yarn", 129) is None
    said = warning("none", 129)
    assert said is not None and "129 tokens" in said and "ends at 128" in said and "add --rope_scaling yarn" in said
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    assert "no other for its rope_type 'linear'" in (warning("none", 129) or "")


def test_a_model_without_rotary_parameters_is_trained_as_it_is() -> None:
    """Nemotron-H has none, and Mamba-2 does not say how far it reads; neither can be stretched."""
    for config in (NemotronHConfig(max_position_embeddings=128), Mamba2Config()):
        plan = plan_rope(config, "none", None, 1024)
        assert not plan.changes and plan.before == {}
        assert plan.pretrained_tokens == pretrained_tokens(config, otherwise=1024)
        with pytest.raises(UserMistake, match="--rope_scaling yarn: .*found none.*use --rope_scaling none"):
            plan_rope(config, "yarn", None, 1024)
    said = beyond_reach(NemotronHConfig(max_position_embeddings=128), plan_rope(config, "none", None, 129), 129)
    assert said is not None and "no single rotary embedding to stretch" in said
    assert pretrained_tokens(NemotronHConfig(max_position_embeddings=128), otherwise=1024) == 128
    assert plan_rope(Gemma3TextConfig(num_hidden_layers=2), "none", None, 1024).before.keys() >= {"full_attention"}
