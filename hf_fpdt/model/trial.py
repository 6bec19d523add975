"""What the layers of a model are seen to do before its first step, and settings that go by it.

`engine.visit` tries each layer; here are the pass that leads through all of them, and what is made of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine import TRIAL_TOKENS, untouched_random_state, visit
from ..parallel import why_not_scan_heads
from ..plan import NO_LIMIT, largest
from .layers import decoder_layers, decoder_of, layer_linears
from .settings import Settings
from .weights.counts import layer_mixes

logger = logging.getLogger(__name__)


def ask_layers(model: PreTrainedModel, layers: list[Any], settings: Settings) -> None:
    """Try the layers, and go by what they do, whatever the configuration says; nothing where they cannot be tried yet.

    Raises:
        NotImplementedError: the model, one of its layers, or what one asks of attention, cannot be had.
    """
    if not try_layers(model):
        return
    _go_by_layers(model, layers, settings)
    _check_scans(layers, settings.group.size)
    if (reason := settings.why_not_served(_may_run_on(model))) is not None:
        raise NotImplementedError(f"hf_fpdt: {reason}.")


def try_layers(model: PreTrainedModel) -> bool:
    """A pass of the model over a few random tokens that tries each layer, and runs none.

    Where weights have no memory, layers are asked what attention they call, and tried at their first step.

    Returns:
        Whether all layers were seen. Where they cannot be (some weights without memory, a model that takes more than
        token ids) they are tried at their first step.

    Raises:
        NotImplementedError: the model, or one of its layers, cannot be run in chunks.
    """
    bare = {tensor.is_meta for tensor in (*model.parameters(), *model.buffers())}
    if len(bare) > 1:
        return False
    text, device = model.config.get_text_config(), next(model.parameters()).device
    tokens = min(TRIAL_TOKENS, largest(text, "max_position_embeddings") or TRIAL_TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, min(text.vocab_size, 1000)), (1, tokens), generator=generator).to(device)
    # With gradients on: what carries one into a layer beside hidden states is seen.
    with torch.enable_grad(), untouched_random_state(device), _in_training_mode(model), visit():
        try:
            (decoder_of(model) if True in bare else model)(input_ids=ids)  # no head can be tried without memory
        except NotImplementedError:
            if True in bare:  # what cannot be asked of values that are not there
                return False
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            logger.debug("hf_fpdt: layers will be tried at the first step: %s", error)
            return False
    layers: list[Any] = decoder_layers(model)
    traits = [layer._fpdt_traits for layer in layers]
    return True not in bare or all(each.asked is not None or not each.attends for each in traits)


@contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    """`from_pretrained` gives models in evaluation mode; it is in training that they are to be exact."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _go_by_layers(model: PreTrainedModel, layers: list[Any], settings: Settings) -> None:
    """What was seen of them becomes the model's sizes and kinds of attention: masks, heads, states."""
    windows, traits = tuple(layer._fpdt_window for layer in layers), [layer._fpdt_traits for layer in layers]
    mixes = layer_mixes(layers, traits, settings.sizes.experts)
    settings.sizes = replace(settings.sizes, windows=windows if any(windows) else (), mixes=mixes)
    settings.sizes = replace(settings.sizes, linears=layer_linears(layers, settings))
    if asked := [each.asked for each in traits if each.asked is not None]:
        # Of layers without attention nobody asks.
        settings.sizes = settings.sizes.with_heads([(each.asked or asked[0]).heads for each in traits])
    # A window that no sequence reaches is none.
    longest = largest(model.config.get_text_config(), "max_position_embeddings") or NO_LIMIT
    specs = [replace(a.spec, window=None) if (a.spec.window or 0) >= longest else a.spec for a in asked]
    settings.asked = tuple(dict.fromkeys(replace(a, spec=spec) for a, spec in zip(asked, specs, strict=True)))


def _check_scans(layers: list[Any], sp_size: int) -> None:
    for layer in layers:
        if why := why_not_scan_heads(layer._fpdt_traits.scan_heads, sp_size):
            raise NotImplementedError(f"hf_fpdt: {layer._fpdt_layer.name} cannot be shared by ranks: {why}.")


def _may_run_on(model: PreTrainedModel) -> list[torch.device]:
    """Where it is; a model that is on the CPU, or has no memory yet, may be moved to a GPU where there is one."""
    if model.device.type not in ("cpu", "meta"):
        return [model.device]
    return [torch.device(kind) for kind in ("cuda", "cpu") if kind == "cpu" or torch.cuda.is_available()]
