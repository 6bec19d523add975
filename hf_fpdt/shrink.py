"""A tiny configuration with the features of a large one, for models that are made to be checked and thrown away.

Kept: the architecture, query heads for each key/value head (up to eight), the head dimension (kernels are chosen by
it), RoPE, norms, biases, activation, tied embeddings, the kinds of layers. Smaller: layers, heads, widths, experts,
vocabulary, windows. Dropout is left out: two models that draw at different places cannot be compared.
"""

from __future__ import annotations

import copy
from typing import Any

LAYERS, MOST_LAYERS = 2, 4
# PLAIN_HEADS where each query head has its own key head; at most SHARED_KV_QUERIES query heads share one.
KV_HEADS, PLAIN_HEADS, SHARED_KV_QUERIES = 2, 4, 8
INTERMEDIATE, EXPERT_WIDTH = 192, 64
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
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def shrunk(config: Any) -> Any:
    """A copy of a transformers text configuration with small sizes and every feature of the model."""
    small = copy.deepcopy(config)
    _shrink_layers(small)
    _shrink_heads(small)
    for names, most in _AT_MOST:
        for name in names:
            value: Any = getattr(small, name, None)
            if _is_number(value) and value > most:
                setattr(small, name, most)
    for name, value in list(vars(small).items()):
        if name.endswith(("dropout", "pdrop")) and _is_number(value):
            setattr(small, name, 0.0)
    for i, name in enumerate(_TOKEN_IDS):
        if getattr(small, name, None) is not None:
            setattr(small, name, i)
    return small


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shrink_layers(small: Any) -> None:
    """One layer of each kind, and at least two: lists with an entry a layer say which kinds there are."""
    layers = small.num_hidden_layers
    lists = {name: value for name, value in vars(small).items() if isinstance(value, list) and len(value) == layers}
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    chosen = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    chosen += [i for i in range(layers) if i not in chosen][: max(0, LAYERS - len(chosen))]
    small.num_hidden_layers = len(chosen)
    for name, value in lists.items():
        setattr(small, name, [value[i] for i in sorted(chosen)])
    if isinstance(getattr(small, "mlp_only_layers", None), list):
        small.mlp_only_layers = [i for i in small.mlp_only_layers if i < len(chosen)]


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
    if head_dim is not None:
        small.head_dim = head_dim
