"""What the layers of a model do, seen without its weights: on tensors that have sizes and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...engine import LayerTraits, StandInCache, TrialCall, build_of, cache_argument, calling, hidden_states_of
from ..attention_function import NAME
from ..layers import decoder_layers, decoder_of, raw_forward_of
from ..patch import arguments_by_name, signature_of

_TOKENS = 16
_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def traits_without_weights(model: PreTrainedModel) -> list[LayerTraits]:
    """Of each decoder layer whether it attends, and which states it hands on.

    Args:
        model: all of it on the meta device; left as it was.

    Returns:
        Of a layer that cannot be run so, what most layers do: attention alone.
    """
    layers = decoder_layers(model)
    seen: dict[tuple[object, ...], LayerTraits] = {}
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    # One of four dimensions goes to the layers as it is; of any other the values would be looked at.
    mask = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device="meta")
    watching = _watched(layers, seen)
    # Where it ends early, what was seen by then was seen.
    with suppress(*_ERRORS), torch.no_grad(), torch.device("meta"), _attention_is_ours(model), watching:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return [seen.get(build_of(layer), LayerTraits()) for layer in layers]


@contextmanager
def _attention_is_ours(model: PreTrainedModel) -> Iterator[None]:
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _watched(layers: list[nn.Module], seen: dict[tuple[object, ...], LayerTraits]) -> Iterator[None]:
    """Inside, each layer that is built like none before is run once with a cache of ours, and gives back its input."""
    before = {id(layer): vars(layer).get("forward") for layer in layers}
    for layer in layers:
        layer.forward = _watching(layer, raw_forward_of(cast("Any", type(layer))), seen)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if before[id(layer)] is not None:
                layer.forward = before[id(layer)]  # type: ignore[assignment]


def _watching(
    layer: nn.Module, forward: Callable[..., Any], seen: dict[tuple[object, ...], LayerTraits]
) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        arguments = arguments_by_name(signature_of(forward), layer, *args, **kwargs)
        hidden: Tensor = arguments.pop(next(iter(arguments)))
        build = build_of(layer)
        if build not in seen:
            seen[build] = _traits(layer, forward, hidden, {**arguments, "attention_mask": None})
        return seen[build].returned(hidden)

    return watched


def _traits(layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, arguments: dict[str, Any]) -> LayerTraits:
    cache, call, name = StandInCache(0), TrialCall(), cache_argument(forward)
    output, done = None, False
    with suppress(*_ERRORS), calling(call):  # of experts, most of all, which come after what is looked for here
        output = forward(layer, hidden, **{**arguments, **({} if name is None else {name: cache})})
        done = hidden_states_of(output) is not None
    return LayerTraits(
        attends=call.calls > 0 or not (done or cache.finals),
        cache=name if cache.asked or cache.finals else None,
        states=cache.sizes(),
        channels=cache.channels(),
        outputs=len(output) if isinstance(output, (tuple, list)) else 0,
    )
