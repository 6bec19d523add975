"""What PEFT's adapters are in a model; which rotary parameters one was trained with, kept in its own configuration.

A PEFT model does not know the folder that its adapter came from, and PEFT drops what it has no field for. Its field
`auto_mapping` (the class of the base model, read where there is no task type) is a dictionary that it keeps.
"""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

KEY = "rope_parameters"

logger = logging.getLogger(__name__)


def mapping_with_rope(model: PreTrainedModel) -> dict[str, Any]:
    """`auto_mapping` for the configuration of an adapter that is trained on `model` as it is now."""
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__, KEY: rope_of(model.config)}


def without_adapters(model: nn.Module) -> list[str]:
    """Linears that adapters on every linear leave out: PEFT has none for the last one of a Mamba.

    Its fused kernel takes the weight past the module.
    """
    return [f"{name}.out_proj" for name, m in model.named_modules() if hasattr(m, "A_log") and hasattr(m, "D")]


def adapter_weights(module: nn.Module) -> set[int]:
    """Weights of PEFT's adapters, by id, whether they act and train now or not; modules saved with them too."""
    held = [
        functools.reduce(getattr, name.split("."), each)
        for each in module.modules()
        for name in getattr(each, "adapter_layer_names", ())
    ]
    return {id(weight) for each in held if isinstance(each, nn.Module) for weight in each.parameters()}


def warn_of_another_rope(model: PreTrainedModel) -> None:
    """Say which adapters of the model were trained with other rotary parameters than it has."""
    now = rope_of(model.config)
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        trained = trained_rope(config)
        if trained is not None and trained != now:
            logger.warning(
                "hf_fpdt: the adapter %r was trained with the rotary parameters %s, and the model it is on has %s: "
                "its losses will be worse, far worse in long texts. Load the base with the adapter's configuration, "
                'AutoModelForCausalLM.from_pretrained("%s", config=AutoConfig.from_pretrained(ADAPTER_FOLDER)).',
                name,
                trained,
                now,
                getattr(config, "base_model_name_or_path", None) or "BASE",
            )


def trained_rope(adapter: Any) -> Any:
    """The rotary parameters that an adapter's configuration (PEFT's) says it was trained with; None: it says none."""
    return (getattr(adapter, "auto_mapping", None) or {}).get(KEY)


def rope_of(config: PreTrainedConfig) -> Any:
    """Of a model. As JSON gives it back, so that what was kept compares with what is."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if isinstance(rope, dict) and not any(isinstance(part, dict) for part in rope.values()):
        rope = {"rope_type": "default", **rope}
    return json.loads(json.dumps(rope, default=str))
