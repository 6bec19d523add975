"""A layer's weights whole while it runs: dequantised once for all chunks of a pass, and gone after it.

bitsandbytes dequantises a weight in every call. In chunks there are many calls a layer, and each would do so again.
While the layer is entered its linears have plain weights, as those of a model that was never quantised; whatever
reads a weight sees that: fused LoRA, PEFT's own code (DoRA takes the norm of a weight), a kernel that goes past the
module. Its memory is one layer's: it is let go of before the next one is entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..fused_linear import patch_quantised
from ..patch import is_patched
from ..settings import Settings
from .quantised import dequantised, is_packed, is_quantised


@contextmanager
def whole_weights(
    layer: nn.Module, settings: Settings, dtype: torch.dtype, device: torch.device, then: int | None = None
) -> Iterator[None]:
    """Inside, a layer's weights are on the device that computes, and those of bitsandbytes are dequantised.

    Args:
        layer: a decoder layer.
        settings: of its model.
        dtype: of hidden states, or what autocast computes in.
        device: where they are.
        then: the place of the layer that is entered next, as far as it is known.

    Raises:
        NotImplementedError: FSDP2 shards such weights, or some that should wait on the host train.
    """
    host = settings.host_weights
    if host is None:
        with dequantised_weights(layer, settings, dtype):
            yield
        return
    check_not_sharded(layer)
    with host.entered(layer, device, then), dequantised_weights(layer, settings, dtype):
        yield


@contextmanager
def dequantised_weights(layer: nn.Module, settings: Settings, dtype: torch.dtype) -> Iterator[None]:
    """Inside, linears of bitsandbytes in the layer have their dequantised weights; of `dtype` if they were int8."""
    packed: list[tuple[Any, nn.Parameter]] = []
    try:
        for module in layer.modules():
            if not is_quantised(module):
                continue
            check_not_sharded(layer)
            weight: Any = module._parameters["weight"]
            # One whose forward somebody replaced would not see it.
            if not is_packed(weight) or not (is_patched(module) or "forward" not in vars(module)):
                continue
            patch_quantised(module, settings)
            whole = dequantised(module, dtype)
            packed.append((module, weight))
            module._parameters["weight"] = nn.Parameter(whole, requires_grad=False)
        yield
    finally:
        for module, weight in packed:
            module._parameters["weight"] = weight


def check_not_sharded(layer: nn.Module) -> None:
    """Refuse what FSDP2 has cut: a part of the packed bytes is no part of a matrix."""
    if hasattr(layer, "unshard"):
        raise NotImplementedError(
            "hf_fpdt: weights that bitsandbytes quantised, or that wait on the host, are not supported under FSDP2: "
            "each GPU can do with all of them; use DDP, which is what accelerate launch does without FSDP."
        )
