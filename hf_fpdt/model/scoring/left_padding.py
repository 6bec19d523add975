"""Rows that are padded on the left (prompts of TRL's GRPO and RLOO), moved to the left and back.

Padding on the left would need a mask; on the right it needs none. A row that is moved keeps its tokens' distances, so
nothing changes where positions are relative. Whether they are, the model is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import RandomState, StandInCache, untouched_random_state, visit
from ...labels import IGNORE_INDEX
from ...plan import largest
from ..layers import decoder_layers, decoder_of

_TRIED_TOKENS, _FAR = 32, 4096
_FOUND = "why positions are not relative"


@dataclass(frozen=True)
class Moved:
    """How rows were moved to the left: by a number of tokens each, around."""

    tokens_B: Tensor

    def there(self, values_BS: Tensor) -> Tensor:
        """Of rows as they were given, in the order of the moved ones; [B, S] or [B, S, ...]."""
        return _rolled(values_BS, self.tokens_B)

    def back(self, values_BS: Tensor) -> Tensor:
        """The other way."""
        return _rolled(values_BS, -self.tokens_B)


def _rolled(values_BS: Tensor, tokens_B: Tensor) -> Tensor:
    rows, length = values_BS.shape[:2]
    places = torch.arange(length, device=values_BS.device)
    index = (places + tokens_B.to(values_BS.device)[:, None]) % length
    return values_BS[torch.arange(rows, device=values_BS.device)[:, None], index]


def padded_left(mask: Any) -> Moved | None:
    """By how much rows of a 2-D mask [B, S] (1 real, 0 padding) are to be moved; None if none begins with padding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    tokens_B = (mask.cumsum(-1) == 0).sum(-1) % mask.shape[-1]
    return Moved(tokens_B) if bool(tokens_B.any()) else None


def move_rows(moved: Moved, arguments: dict[str, Any], targets_BS: Tensor) -> Tensor:
    """Move what a model is called with, in place, and the labels of next tokens.

    Raises:
        ValueError: a label counts that padding would predict.
        NotImplementedError: an argument whose tokens are not along axis 1.
    """
    mask_BS = arguments["attention_mask"]
    padding_BS = (mask_BS.cumsum(-1) == 0).to(targets_BS.device)
    if bool((padding_BS & (targets_BS != IGNORE_INDEX)).any()):
        raise ValueError(
            "hf_fpdt: a row is padded on the left, and its first token has a label, which padding would predict: set "
            f"that label to {IGNORE_INDEX}."
        )
    shape = mask_BS.shape
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or shape[1] not in value.shape:
            continue
        if value.shape[:2] != shape:
            raise NotImplementedError(
                f"hf_fpdt: rows are padded on the left, and {name} of shape {tuple(value.shape)} has its tokens along "
                f"another axis than attention_mask {tuple(shape)}: pad on the right, or give one row a batch."
            )
        arguments[name] = moved.there(value)
    return moved.there(targets_BS)


def why_not_moved(model: Any) -> str | None:
    """`why_not_relative` of a model that may be wrapped by PEFT; None too where FPDT's head is not what answers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return why_not_relative(inner) if hasattr(inner, "_fpdt") else None


def why_not_relative(model: Any) -> str | None:
    """Why rows may not be moved, as the model's positions are not, or not known to be, relative; None if they are.

    A few tokens are embedded at two places. All that may differ for layers is a rotation, by which queries and keys
    are multiplied; with the same rotation, each layer must give the same, to the bit.

    Args:
        model: with FPDT applied; asked once.
    """
    found: dict[Any, Any] = model._fpdt.found
    if _FOUND not in found:
        found[_FOUND] = _why_not_relative(model)
    why: str | None = found[_FOUND]
    return why


def _why_not_relative(model: Any) -> str | None:
    layers: list[Any] = decoder_layers(model)
    decoder = decoder_of(model)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        attends = any(layer._fpdt_traits.attends for layer in layers)
        return "it takes no position_ids, by which that could be asked" if attends else None
    text = model.config.get_text_config()
    most = largest(text, "max_position_embeddings") or _FAR
    tokens = min(_TRIED_TOKENS, most // 2)
    device = decoder.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(text.vocab_size, 1000), (1, tokens), generator=generator).to(device)
    positions = torch.arange(tokens, device=device)[None]
    with torch.no_grad(), untouched_random_state(device):
        began = RandomState.now(device)
        near, far = (
            _given_to_layers(decoder, layers, ids, at, began) for at in (positions, positions + most - tokens)
        )
        for layer, (x, given), (other_x, other) in zip(layers, near, far, strict=True):
            if not torch.equal(x, other_x):
                return "its embeddings know the place of a token"
            mixed = {name: value if _is_rotation(value) else other[name] for name, value in given.items()}
            here, there = (
                _layer_alone(layer, x, arguments, before, began)
                for arguments, before in ((given, 0), (mixed, most - tokens))
            )
            if not torch.equal(here, there):
                return f"{layer._fpdt_layer.name} knows the place of a token by more than a rotation"
    return None


def _layer_alone(layer: Any, x: Tensor, arguments: Mapping[str, Any], before: int, began: RandomState) -> Tensor:
    """A layer's own forward; one that asks a cache is told of `before` tokens that came before."""
    cache = layer._fpdt_traits.cache
    told = {} if cache is None else {cache: StandInCache(before)}
    began.restore()
    with layer._fpdt_layer.gathered_weights(x.dtype, x.device):
        y = layer._fpdt_layer.forward(x, **{**arguments, **told})
    return y[0] if isinstance(y, tuple) else y


def _given_to_layers(
    decoder: Any, layers: list[Any], ids: Tensor, positions: Tensor, began: RandomState
) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """Hidden states and other arguments that each layer is called with, when none of them runs."""
    given: list[tuple[Tensor, Mapping[str, Any]]] = []

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module._fpdt_layer.raw_forward).parameters)[1:]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        given.append((named.pop(names[0]), named))

    hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in layers]
    try:
        with visit():
            began.restore()
            decoder(input_ids=ids, position_ids=positions)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _is_rotation(value: Any) -> bool:
    """Whether it is the cosines and sines of angles, times one factor, or complex numbers of one size."""
    if isinstance(value, Tensor) and value.is_complex():
        sizes = value.abs()
    elif isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        cos, sin = value
        sizes = (cos.double() ** 2 + sin.double() ** 2).sqrt()
    else:
        return False
    return bool((sizes - sizes.mean()).abs().max() <= 0.02 * sizes.mean())
