"""How many weights of a layer a token meets, and how many are merged into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...engine import LayerTraits
from ...plan import LayerMix
from .quantised import shape_of


def layer_mixes(layers: Sequence[Any], traits: Sequence[LayerTraits], experts: int) -> tuple[LayerMix, ...]:
    """What each layer does, for the arithmetic; () where all attend, and none carries a state.

    Args:
        layers: of a decoder.
        traits: what each was seen to do.
        experts: chosen experts that one token visits.
    """
    if all(each.attends and not each.states for each in traits):
        return ()
    return tuple(
        LayerMix(each.attends, _met_weights(layer, experts), each.states, each.channels)
        for layer, each in zip(layers, traits, strict=True)
    )


def _met_weights(layer: nn.Module, experts: int) -> int:
    """Weights of matrices and convolutions that one token meets, adapters aside; of experts those that it visits."""
    met = 0
    for name, module in layer.named_modules():
        for weight in module.parameters(recurse=False) if "lora_" not in name else ():
            if weight.dim() == 2 or isinstance(module, nn.Conv1d):
                met += shape_of(weight).numel()
            elif weight.dim() == 3:  # of all experts
                met += weight.numel() * experts // weight.shape[0]
    return met


def merged_weights(layers: Sequence[Any]) -> int:
    """Of the layer with most: weights that PEFT's adapters of parameters are merged into whenever it runs."""
    return max(
        sum(m.get_param().numel() for m in layer.modules() if type(m).__name__ == "ParamWrapper") for layer in layers
    )
