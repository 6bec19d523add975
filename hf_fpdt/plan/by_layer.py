"""Attributes of a transformers configuration whose layers may differ.

Layers differ where `config.per_layer_config` says so (transformers then refuses to read the attribute off the whole
configuration), or where a size is a list. What the plan of memory and the exchange of heads take one number of is that
number here, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..layout import Block

NEEDED_SIZES = ("hidden_size", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
# Of a head's keys with and without positions, and of its values.
LATENT_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SLIDING, CHUNKED = "sliding_attention", "chunked_attention"


class LayersDiffer(ValueError):
    """An attribute of which one number is needed is not the same in every layer."""


def by_layer(config: Any, name: str, default: Any = None) -> list[Any]:
    """The attribute in every layer; a list of one where the configuration has one value for all of them."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, default) for layer in config.per_layer_config]
    value = getattr(config, name, default)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def one_value(config: Any, name: str, default: Any = None) -> Any:
    """The attribute, which all layers have in common.

    Raises:
        LayersDiffer: they have not; the message has the values.
    """
    first, *others = by_layer(config, name, default)
    if any(value != first for value in others):
        raise LayersDiffer(f"its layers differ in {name} ({_listed([first, *others])}), and one number is needed")
    return first


def largest(config: Any, name: str) -> Any:
    """The attribute of the layer in which it is largest; None where no layer has it."""
    return max((value for value in by_layer(config, name) if value is not None), default=None)


class AttentionSizes(NamedTuple):
    """Heads of attention as its kernel gets them, and their widths.

    Attributes:
        q_heads: query heads.
        kv_heads: key/value heads.
        head_dim: elements of a head of queries and keys.
        value_dim: elements of a head of values and of the output.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def attention_sizes(config: Any) -> AttentionSizes:
    """What all layers have in common of these.

    Raises:
        LayersDiffer: they have not.
    """
    heads = one_value(config, "num_attention_heads")
    if heads is None and has_no_attention(config):
        return AttentionSizes(1, 1, 0, 0)
    if is_latent(config):
        # Keys and values come out of a latent for every query head; a part of the keys has positions.
        width = one_value(config, "qk_nope_head_dim") + one_value(config, "qk_rope_head_dim")
        return AttentionSizes(heads, heads, width, one_value(config, "v_head_dim"))
    head_dim = one_value(config, "head_dim") or one_value(config, "hidden_size") // heads
    kv_heads, value_dim = one_value(config, "num_key_value_heads"), one_value(config, "v_head_dim")
    return AttentionSizes(heads, kv_heads or heads, head_dim, value_dim or head_dim)


def has_no_attention(config: Any) -> bool:
    """Whether the types of its layers say that none attends."""
    return set(getattr(config, "layer_types", None) or [None]) <= {"linear_attention", "conv", "mamba"}


def is_latent(config: Any) -> bool:
    """Whether keys and values are made out of a latent (MLA): the configuration then has three widths of a head."""
    return all(largest(config, name) for name in LATENT_SIZES)


def latent_weights(config: Any) -> int:
    """Weights of one layer's projections around such an attention: of queries, keys and values, and of the output.

    Queries too may come out of a latent (`q_lora_rank`).
    """
    hidden, (heads, _, head_dim, value_dim) = one_value(config, "hidden_size"), attention_sizes(config)
    q_rank, kv_rank = one_value(config, "q_lora_rank"), one_value(config, "kv_lora_rank")
    rotated, plain = one_value(config, "qk_rope_head_dim"), one_value(config, "qk_nope_head_dim")
    queries = q_rank * (hidden + heads * head_dim) if q_rank else hidden * heads * head_dim
    keys_values = hidden * (kv_rank + rotated) + kv_rank * heads * (plain + value_dim)
    return int(queries + keys_values + heads * value_dim * hidden)


def windows_of(config: Any) -> list[int | None]:
    """Of each layer the keys that a query sees, its own among them, or its block; None: all before it.

    A window that no sequence reaches is one all the same: the length decides when it runs.
    """
    layers, windows = config.num_hidden_layers, by_layer(config, "sliding_window")
    if len(windows) != layers:
        windows = windows[:1] * layers
    if getattr(config, "use_sliding_window", True) is False:
        return [None] * layers
    # Without types every layer hands the window to attention.
    kinds = getattr(config, "layer_types", None) or [SLIDING] * layers
    block = largest(config, "attention_chunk_size")
    reach: dict[str, int] = {CHUNKED: Block(block)} if block else {}
    by_kind = zip(kinds, windows, strict=True)
    return [(window or None) if kind == SLIDING else reach.get(kind) for kind, window in by_kind]


def head_dims(config: Any) -> list[int]:
    """Of all layers, each once; [] where the configuration does not say."""
    heads, hidden = by_layer(config, "num_attention_heads"), by_layer(config, "hidden_size")
    dims = by_layer(config, "head_dim")
    if None in dims and None not in (*heads, *hidden) and len(heads) == len(hidden) == len(dims):
        dims = [dim or size // n for dim, size, n in zip(dims, hidden, heads, strict=True)]
    return sorted(set(dims) - {None})


def why_no_sizes(config: Any) -> list[str]:
    """Reasons why the sizes that a plan is made of cannot be read off a text configuration; [] if they can."""
    needed = [name for name in NEEDED_SIZES if name != "num_attention_heads" or not has_no_attention(config)]
    missing = [name for name in needed if None in by_layer(config, name)]
    reasons = [f"its configuration has no {name}, so its memory cannot be planned" for name in missing]
    for name in (*NEEDED_SIZES, *OPTIONAL_SIZES):
        try:
            one_value(config, name)
        except LayersDiffer as error:
            reasons.append(str(error))
    return reasons


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """By name, every list of the configuration that has an entry for each layer."""
    layers = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers}
    return {name: value for name, value in lists.items() if "token_id" not in name}


def layer_sets(config: Any) -> dict[str, list[int]]:
    """By name, every list of the configuration that says which layers are of a kind, by their places."""
    lists = {name: value for name, value in vars(config).items() if "layer" in name and _are_places(value, config)}
    return {name: value for name, value in lists.items() if name not in layer_lists(config)}


def layer_overrides(config: Any) -> list[dict[str, Any]]:
    """What each layer has of its own; [] of a configuration whose layers are all alike."""
    if not getattr(config, "is_heterogeneous", False):
        return []
    names = config.per_layer_attributes
    return [
        {name: getattr(layer, name) for name in names} | {"skip": list(layer.skip)}
        for layer in config.per_layer_config
    ]


def take_layers(config: Any, layers: Sequence[int]) -> None:
    """Make `config` one of these of its layers, in this order; the same one may come more than once."""
    overrides, lists, sets = layer_overrides(config), layer_lists(config), layer_sets(config)
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in layers])
    for name, value in sets.items():
        setattr(config, name, [place for place, i in enumerate(layers) if i in value])
    config.num_hidden_layers = len(layers)
    if overrides:
        config.per_layer_config = {place: overrides[i] for place, i in enumerate(layers)}


def _are_places(value: Any, config: Any) -> bool:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < config.num_hidden_layers for i in value):
        return False
    return value == sorted(set(value))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values))
