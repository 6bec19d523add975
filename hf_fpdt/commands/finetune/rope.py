"""Change a model's rotary position embedding so that it reaches further than it was trained.

Works on `config.rope_parameters` of transformers 5 (one dictionary for the model: Llama, GPT-NeoX, Mistral, Qwen ...),
and rebuilds the rotary modules of a loaded model in place, so that the weights are read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..options import UserMistake

KINDS = ("none", "linear", "yarn")


@dataclass(frozen=True)
class RopePlan:
    """The rotary parameters before and after, and the length the model claims afterwards."""

    kind: str
    factor: float
    before: dict[str, Any]
    after: dict[str, Any]
    max_position_embeddings: int
    pretrained_tokens: int

    @property
    def changes(self) -> bool:
        """Whether the model's frequencies differ afterwards."""
        return self.after != self.before


def plan_rope(config: PreTrainedConfig, kind: str, factor: float | None, max_length_tokens: int) -> RopePlan:
    """Decide the new rope_parameters; factor None means: just enough for max_length_tokens.

    Raises:
        UserMistake: they are to be stretched, and there is no single set of them (Nemotron-H has none).
    """
    pretrained = pretrained_tokens(config, otherwise=max_length_tokens)
    if kind == "none":
        before = _own_parameters(config)
        return RopePlan(kind, 1.0, before, dict(before), max(_positions(config), max_length_tokens), pretrained)
    before = _rope_parameters(config, kind)
    if before["rope_type"] not in ("default", kind):
        raise UserMistake(
            f"--rope_scaling {kind}: this model already has rope_type {before['rope_type']!r}; allowed: "
            f"default or {kind}; use --rope_scaling none to keep the model's own"
        )
    factor = factor if factor is not None else max(1.0, max_length_tokens / pretrained)
    reach = max(max_length_tokens, round(pretrained * factor))
    if factor == 1.0:
        return RopePlan("none", 1.0, before, dict(before), reach, pretrained)
    after = {**before, "rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        after["original_max_position_embeddings"] = pretrained
    return RopePlan(kind, float(factor), before, after, reach, pretrained)


def pretrained_tokens(config: PreTrainedConfig, otherwise: int) -> int:
    """How far a model read before anything stretched it; `otherwise` where its configuration does not say."""
    own = _own_parameters(config).get("original_max_position_embeddings")
    return int(own or _positions(config) or otherwise)


def beyond_reach(config: PreTrainedConfig, plan: RopePlan, max_length_tokens: int) -> str | None:
    """A warning where windows are longer than the model's configuration says it reads, and nothing stretches it."""
    positions = _positions(config)
    if plan.changes or not positions or max_length_tokens <= positions:
        return None
    kind = plan.before.get("rope_type")
    if kind is None:
        what = "it has no single rotary embedding to stretch"
    else:
        what = "add --rope_scaling yarn" if kind == "default" else f"there is no other for its rope_type {kind!r} here"
    return (
        f"warning: windows have up to {max_length_tokens:,} tokens, the model's configuration ends at "
        f"{positions:,} and --rope_scaling is none: {what}; see the loss by position"
    )


def _positions(config: PreTrainedConfig) -> int:
    """That the configuration allows; 0: it does not say (Mamba-2)."""
    return int(getattr(config, "max_position_embeddings", None) or 0)


def _own_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """As the model has them: one set, one for each layer type, or none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", **parameters} if "rope_theta" in parameters else dict(parameters)


def _rope_parameters(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    parameters = _own_parameters(config)
    if "rope_theta" not in parameters:
        found = "one set for each layer type" if parameters else "none"
        raise UserMistake(
            f"--rope_scaling {kind}: {type(config).__name__} has no single set of rotary parameters (found {found}); "
            "allowed: models with one config.rope_parameters, as Llama and GPT-NeoX have; use --rope_scaling none"
        )
    return parameters


def apply_rope(model: PreTrainedModel, plan: RopePlan) -> None:
    """Write the plan into the model's config and rebuild its rotary modules from it."""
    if plan.after:
        model.config.rope_parameters = dict(plan.after)
    model.config.max_position_embeddings = plan.max_position_embeddings
    for parent, name, rotary in rotary_modules(model):
        setattr(parent, name, type(rotary)(config=model.config).to(rotary.inv_freq.device))


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, module) of every rotary embedding in the model."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "inv_freq") and hasattr(child, "rope_type")
    ]
