"""A tiny configuration with the features of a large one, for models that are made to be checked and thrown away.

Kept: the architecture, query heads for each key/value head (up to eight), the head dimension (kernels are chosen by
it), RoPE, norms, biases, activation, tied embeddings, the kinds of layers. Smaller: layers, heads, widths, experts,
vocabulary, windows. Dropout is left out: two models that draw at different places cannot be compared.
"""

from __future__ import annotations

import copy
from typing import Any

from ...plan import layer_lists, layer_overrides, layer_sets, one_value, take_layers

LAYERS, MOST_LAYERS = 2, 4
# PLAIN_HEADS where each query head has its own key head; at most SHARED_KV_QUERIES query heads share one.
KV_HEADS, PLAIN_HEADS, SHARED_KV_QUERIES = 2, 4, 8
INTERMEDIATE, EXPERT_WIDTH = 192, 64
WITHOUT_HEADS = 256  # hidden sizes of a model without attention
EXPERTS, EXPERTS_A_TOKEN, EXPERT_GROUPS = 8, 2, 2
VOCABULARY = 128
WINDOW = 40

# What smaller sizes are at most, by every name that transformers' configurations have for them.
_AT_MOST: tuple[tuple[tuple[str, ...], int], ...] = (
    (("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), INTERMEDIATE),
    (("moe_intermediate_size", "shared_expert_intermediate_size"), EXPERT_WIDTH),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    (("num_experts_per_tok", "moe_k"), EXPERTS_A_TOKEN),
    (("n_group", "topk_group"), EXPERT_GROUPS),
    (("first_k_dense_replace", "n_shared_experts", "decoder_sparse_step"), 1),
    (("sliding_window",), WINDOW),
    (("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
)
# Of Mamba-2, by every name that configurations have for heads and their width.
_MAMBA_HEADS = (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("num_heads", "head_dim"))
# In the names of settings that draw random numbers in training; with 0 they draw none.
_RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def shrunk(config: Any) -> Any:
    """A copy of a transformers text configuration with small sizes and every feature of the model.

    Raises:
        LayersDiffer: its layers have different numbers of heads, so no smaller numbers keep their ratios.
    """
    small = copy.deepcopy(config)
    take_layers(small, _one_of_each_kind(small))
    overrides = layer_overrides(small)
    if not overrides:
        _shrink_sizes(small)
        return small
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        one_value(small, name)
    layers = list(small.per_layer_config)
    small.per_layer_config = None
    for name, value in overrides[0].items():
        setattr(small, name, value)
    for each in (small, *layers):
        _shrink_sizes(each)
    small.per_layer_config = {
        i: {name: getattr(layer, name) for name in overrides[i]} for i, layer in enumerate(layers)
    }
    return small


def _shrink_sizes(small: Any) -> None:
    if getattr(small, "num_attention_heads", None) is not None:
        _shrink_heads(small)
    else:
        small.hidden_size = min(small.hidden_size, WITHOUT_HEADS)
    _shrink_recurrence(small)
    for names, most in _AT_MOST:
        for name in names:
            value: Any = getattr(small, name, None)
            if _is_number(value) and value > most:
                setattr(small, name, most)
    if hasattr(small, "intermediate_size") and hasattr(small, "expand"):
        small.intermediate_size = int(small.expand * small.hidden_size)
    for name, value in list(vars(small).items()):
        if any(word in name for word in _RANDOM) and _is_number(value):
            setattr(small, name, 0.0)
    for i, name in enumerate(_TOKEN_IDS):
        if getattr(small, name, None) is not None:
            setattr(small, name, i)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of_each_kind(config: Any) -> list[int]:
    """One layer of each kind, and at least two: what has an entry a layer says which kinds there are."""
    layers = range(config.num_hidden_layers)
    sets = [[i in places for i in layers] for places in layer_sets(config).values()]
    columns = [column for column in (*layer_lists(config).values(), *sets, layer_overrides(config)) if column]
    kinds = list(zip(*columns, strict=True)) if columns else []
    chosen = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    chosen += [i for i in layers if i not in chosen][: max(0, LAYERS - len(chosen))]
    return sorted(chosen)


def _shrink_recurrence(small: Any) -> None:
    """Fewer heads of scans, of the width that they have, as many value heads a key head and heads a group as fit."""
    keys, values = (getattr(small, f"linear_num_{kind}_heads", None) for kind in ("key", "value"))
    if keys and values:
        small.linear_num_key_heads, small.linear_num_value_heads = KV_HEADS, KV_HEADS * max(1, values // keys)
    if getattr(small, "linear_num_heads", None):
        small.linear_num_heads = min(PLAIN_HEADS, small.linear_num_heads)
    for groups in ("mamba_n_groups", "n_groups"):
        if getattr(small, groups, None):
            setattr(small, groups, min(KV_HEADS, getattr(small, groups)))
    expand = getattr(small, "mamba_expand", None) or getattr(small, "expand", None)
    for heads, width in _MAMBA_HEADS:
        if not getattr(small, heads, None):
            continue
        # Where the heads together are so many times as wide as hidden states, they must stay so.
        tied = expand and not hasattr(small, "mamba_d_ssm") and heads != "mamba_num_heads"
        fewer = int(expand * small.hidden_size) // getattr(small, width) if tied else PLAIN_HEADS
        setattr(small, heads, fewer)
        if getattr(small, "mamba_d_ssm", None):
            small.mamba_d_ssm = fewer * getattr(small, width)


def _shrink_heads(small: Any) -> None:
    """As many query heads a key/value head as before; the head dimension stays, and with it hidden sizes a head."""
    heads, hidden = small.num_attention_heads, small.hidden_size
    kv_heads = getattr(small, "num_key_value_heads", None)
    head_dim = getattr(small, "head_dim", None)
    if kv_heads is None or kv_heads == heads:
        fewer, fewer_kv = min(PLAIN_HEADS, heads), min(PLAIN_HEADS, heads)
    elif kv_heads == 1:
        fewer, fewer_kv = min(heads, SHARED_KV_QUERIES), 1
    else:
        fewer, fewer_kv = KV_HEADS * min(heads // kv_heads, SHARED_KV_QUERIES), KV_HEADS
    small.num_attention_heads = fewer
    if kv_heads is not None:
        small.num_key_value_heads = fewer_kv
    small.hidden_size = -(-hidden * fewer // heads // fewer) * fewer
    if head_dim != getattr(small, "head_dim", None):
        small.head_dim = head_dim
