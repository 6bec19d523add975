"""What transformers calls: the attention function and the mask function registered under "fpdt".

The attention function alone is exact causal attention of whole q, k, v. Inside the layer executor the same function
does one chunk's part. What it cannot compute exactly it refuses. A padding mask is never dropped: right padding needs
none, and what does need a mask is computed by SDPA without gradients (left-padded `generate()`), refused with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention import AttentionSpec
from ..engine import attend_documents, attend_whole, current_call, visiting
from ..layout import Block, Documents
from ..parallel import MARKS, documents_of_batch, marked_documents, ranks_of_batch, text_positions

NAME = "fpdt"
MASK_BYTES_LIMIT = 4 * 2**30  # of a boolean [batch, 1, queries, keys] mask


def register() -> None:
    """Make `attn_implementation="fpdt"` known to transformers."""
    AttentionInterface.register(NAME, fpdt_attention)
    AttentionMaskInterface.register(NAME, fpdt_mask)


def fpdt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact causal attention, differentiable, in transformers' calling convention.

    Args:
        query: [B, N, S, H]; the last query is aligned with the last key.
        key, value: [B, G, T, H], G a divisor of N.
        attention_mask: None, what `fpdt_mask` gave for a window, or a 4-D mask, which SDPA then computes (only without
            gradients).
        scaling: factor of the scores; None: 1/√H.
        kwargs: of them `sliding_window`, `softcap`, `s_aux` (sinks [N]) and, of a packed row, `cu_seq_lens_q` or
            `seq_idx` are computed with.

    Returns:
        out [B, S, N, H of V] and None (attention weights are never built).

    Raises:
        NotImplementedError: the model asks for something that is not computed exactly; the message names it.
    """
    call = current_call()
    _refuse(module, dropout, kwargs)
    window = window_of_mask(attention_mask)
    # A layer is given its window beside the call: a mask that reaches attention there came by another way.
    if attention_mask is not None and (window is None or call is not None):
        _refuse_mask_in_training(attention_mask, query, key, value)
        return _under_mask(module, query, key, value, attention_mask, scaling, kwargs)
    if call is None and query.shape[2] == 1 and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    # Of the whole sequence: a chunk's own keys say nothing about a window.
    keys = (call and call.n_tokens) or key.shape[2]
    window = _agreed_window(module, call.window if call else window, kwargs.get("sliding_window"), keys)
    q_BSNH, k_BTGH, v_BTGH = (_at_autocast(x).transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks_N = kwargs.get("softcap"), kwargs.get("s_aux")
    documents = _marked(module, kwargs, query, key) if call is None else call.documents
    if call is None:
        kind: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks_N": sinks_N}
        if documents is not None:
            return attend_documents(q_BSNH, k_BTGH, v_BTGH, documents, **kind), None
        return attend_whole(q_BSNH, k_BTGH, v_BTGH, **kind), None
    packed = documents is not None
    spec = AttentionSpec.of(q_BSNH, k_BTGH, v_BTGH, scale, window=window, softcap=softcap, packed=packed)
    return call.attend(q_BSNH, k_BTGH, v_BTGH, spec=spec, sinks_N=sinks_N), None


def _marked(module: nn.Module, kwargs: dict[str, Any], query: Tensor, key: Tensor) -> Documents | None:
    """The documents that the arguments mark, without the executor; positions alone make a mask, which came before."""
    marks = {name: kwargs[name] for name in MARKS if kwargs.get(name) is not None}
    if not marks:
        _refuse_restarts(module, text_positions(kwargs.get("position_ids")), (query.shape[2], key.shape[2]))
        return None
    if query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f'hf_fpdt: attn_implementation="{NAME}" in {type(module).__name__}: {", ".join(marks)} mark one row, and '
            f"queries {tuple(query.shape)} of keys {tuple(key.shape)} are none; give one packed row without a cache."
        )
    return marked_documents(marks, key.shape[2])


def _refuse_restarts(module: nn.Module, positions_BS: Tensor | None, tokens: tuple[int, int]) -> None:
    """Refuse documents that would see one another, since the model made no mask of its positions.

    Args:
        positions_BS: as the layer has them, if it handed them on.
        tokens: of queries and of keys.
    """
    if positions_BS is None or positions_BS.is_meta or positions_BS.shape[-1:] != tokens[:1] or tokens[0] != tokens[1]:
        return
    changes = 0 if positions_BS.is_inference() else positions_BS._version
    if _restart(positions_BS, changes):
        raise NotImplementedError(
            f'hf_fpdt: attn_implementation="{NAME}" in {type(module).__name__}: position_ids restart, so a row holds '
            "several documents, and each would see the others: this model makes no mask of positions, or none beside "
            "a cache. Call apply_fpdt(model) or train with FPDTTrainer, which tell documents apart; else give one "
            "document a row."
        )


@lru_cache(maxsize=1)
def _restart(positions_BS: Tensor, changes: int) -> bool:
    """Whether a later token is a first one; every layer asks of the same tensor, and the host waits once."""
    return bool((positions_BS[..., 1:] == 0).any())


def _agreed_window(module: nn.Module, masked: int | None, asked: int | None, keys: int) -> int | None:
    """Keys that a query sees, where they are fewer than `keys`.

    Args:
        masked: by the mask that the model made, which is what other attention functions go by.
        asked: by the argument, which only FlashAttention goes by, and which some models leave out.

    Raises:
        NotImplementedError: the two differ.
    """
    masked = masked if masked is not None and masked < keys else None
    if asked and (asked if asked < keys else None) != masked:
        raise NotImplementedError(
            f'hf_fpdt: attn_implementation="{NAME}" in {type(module).__name__}: its attention asks for a window of '
            f"{asked} keys, and the mask made for it for {'none' if masked is None else masked}, so which is meant is "
            'not known. Otherwise choose "sdpa" or "eager".'
        )
    return masked


def _under_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention under a mask that exists, without gradients: by SDPA, or in plain PyTorch where that has no such kind.

    Args:
        query, key, value: [B, N or G, S or T, H].
        mask: [B, 1, S, T], True where a query sees a key, or numbers to be added to scores.
    """
    softcap, sinks_N = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is None and sinks_N is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    mask = mask[:, :, :, : key.shape[2]]
    bool_mask = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if bool_mask else scores + mask
    if sinks_N is not None:
        column = sinks_N.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return (shares @ value.float()).to(query.dtype).transpose(1, 2), None


def _at_autocast(x: Tensor) -> Tensor:
    """Autocast runs attention in its own dtype; RoPE may have made q and k wider."""
    kind = "cpu" if x.is_meta else x.device.type  # without memory there is none
    narrow = torch.is_autocast_enabled(kind) and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype(kind)) if narrow else x


# Arguments some models pass to attention, with why none of them may be dropped.
_REFUSED_ARGUMENTS = (
    ("indices", "it looks at chosen keys alone (sparse attention), which is not supported"),
    ("position_bias", "attention bias is not served by a kernel yet"),
    ("cache", "continuous batching is not supported; use generate(), or another attn_implementation"),
)


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    reason = next((why for name, why in _REFUSED_ARGUMENTS if kwargs.get(name) is not None), None)
    is_causal = kwargs.get("is_causal")
    if dropout:
        reason = f"attention dropout {dropout} is not supported; load the model with attention_dropout=0.0"
    elif not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        reason = "attention that is not causal is not supported"
    elif kwargs.get("output_attentions"):
        reason = "attention weights are never built; leave output_attentions off"
    if reason is not None:
        raise NotImplementedError(
            f'hf_fpdt: attn_implementation="{NAME}" in {type(module).__name__}: {reason}. Otherwise choose "sdpa" '
            'or "eager".'
        )


def _refuse_mask_in_training(mask: Tensor, *qkv: Tensor) -> None:
    if mask.is_meta or (torch.is_grad_enabled() and any(x.requires_grad for x in qkv)):
        raise NotImplementedError(
            f'hf_fpdt: attn_implementation="{NAME}": an attention mask (left padding, a 4-D mask, packed documents) '
            "is not supported in training; pad on the right with label -100 and pass no other mask."
        )


def fpdt_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None where plain causal attention is right for every real token; else SDPA's mask, only without gradients.

    Plain: no padding, or padding on the right of a whole sequence (a real token never sees it; its own outputs are
    nobody's, label -100). Where it would be plain but for a window, the mask has no storage: it says which window
    (`window_of_mask`), and attention computes with that.

    Raises:
        NotImplementedError: a mask is needed while gradients are on, or it would fill memory.
    """
    window = kwargs.get("local_size")  # Qwen2-MoE makes a mask for a window of 0 too, which no layer uses
    ranks = ranks_of_batch()
    if (ranks > 1 or documents_of_batch() is not None) and attention_mask is None:
        # The engine knows the documents; transformers takes the gaps in a rank's position_ids for such, too.
        if _looks_ahead(batch_size, q_length, kwargs):
            raise NotImplementedError(f'hf_fpdt: attn_implementation="{NAME}": {_why_no_mask(None, False, 0)}')
        return _window_mask(batch_size, q_length, kv_length, ranks, kwargs) if window else None
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_length + kv_offset
    plain = allow_is_causal_skip and aligned
    plain = plain and _padded_on_the_right_at_most(attention_mask, q_length, kv_length)
    if plain and (not window or (kv_length <= window and not visiting() and _sees_all(kv_offset, window, kwargs))):
        return None
    if plain and q_length == kv_length:
        return _window_mask(batch_size, q_length, kv_length, 1, kwargs)
    needed = batch_size * q_length * kv_length
    reason = _why_no_mask(attention_mask, allow_is_causal_skip and not window, needed)
    if reason is not None:
        raise NotImplementedError(f'hf_fpdt: attn_implementation="{NAME}": {reason}')
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask}
    # Never None from here: over a static cache SDPA means by it that the FIRST query is aligned with the first key.
    return sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=False, **kwargs)


def _window_mask(batch_size: int, q_length: int, kv_length: int, ranks: int, kwargs: dict[str, Any]) -> Tensor | None:
    """A mask without storage that says which window it is for; None of one that no query reaches.

    One that is local in another way than a window or a block says nothing, and whoever uses it is refused. A rank's
    part of a sequence cannot be asked that: transformers' function goes by the places of its tokens, and sees no two
    pieces of it as one document. The whole was asked when the layers were tried; a layer remembers.
    """
    window, mask_function = kwargs["local_size"], kwargs.get("mask_function")
    if window >= kv_length * ranks and not visiting():
        return None
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    if ranks > 1 or documents_of_batch() is not None or mask_function is None:
        mask.fpdt_window = window  # type: ignore[attr-defined]
    elif (kind := _kind_of(mask_function, window)) is not None:
        mask.fpdt_window = kind(window)  # type: ignore[attr-defined]
    return mask


def _looks_ahead(batch_size: int, tokens: int, kwargs: dict[str, Any]) -> bool:
    """Whether some token of a rank's part sees the one after it, as those of an image do."""
    if kwargs.get("mask_function") is None or tokens < 2:
        return False
    rows, queries = (torch.arange(count, device=kwargs.get("device")) for count in (batch_size, tokens - 1))
    seen = kwargs["mask_function"](rows[:, None], torch.tensor(0), queries, queries + 1)
    return bool(torch.as_tensor(seen).any())


def _sees_all(kv_offset: int, window: int, kwargs: dict[str, Any]) -> bool:
    """Whether every query sees all of no more keys than its window: where a block begins among them it does not."""
    mask_function = kwargs.get("mask_function")
    return kv_offset == 0 or mask_function is None or _kind_of(mask_function, window) is int


def _kind_of(mask_function: Callable[..., Any], window: int) -> type[int] | None:
    """`int` where a query sees the last `window` keys, `Block` where it sees those of its own block, else None."""
    pairs = ((window - 1, 0), (window, 0), (window, 1), (window, window))
    places = [(torch.tensor(query), torch.tensor(key)) for query, key in pairs]
    seen = [bool(mask_function(torch.tensor(0), torch.tensor(0), *place)) for place in places]
    if seen == [True, False, True, True]:
        return int
    return Block if seen == [True, False, False, True] else None


def window_of_mask(mask: Tensor | None) -> int | None:
    """The window that a mask of `fpdt_mask` stands for; None of any other."""
    window: int | None = getattr(mask, "fpdt_window", None)
    return window


def _padded_on_the_right_at_most(mask_BT: Tensor | None, q_length: int, kv_length: int) -> bool:
    """Whether every row of a 2-D mask (1 real, 0 padding) is all ones, or ones then zeros of a whole sequence."""
    if mask_BT is None:
        return True
    if mask_BT.shape[-1] != kv_length:
        return False
    if q_length < kv_length:
        return bool(mask_BT.all())
    return bool((mask_BT[:, 1:] <= mask_BT[:, :-1]).all() & mask_BT[:, 0].all())


def _why_no_mask(mask_BT: Tensor | None, full: bool, needed_bytes: int) -> str | None:
    left = None if mask_BT is None else _left_padding(mask_BT)
    padding = full and mask_BT is not None
    what = left or ("padding that is not on the right alone" if padding else "a mask other than causal")
    if torch.is_grad_enabled() or ranks_of_batch() > 1 or documents_of_batch() is not None:
        remedy = (
            "give prompts of one length to TRL's GRPO and RLOO, or one prompt a batch (steps_per_generation=1, "
            "per_device_train_batch_size=num_generations)"
            if left
            else "give no token a later one to see, as those of an image do (leave token_type_ids out where there is "
            "none; without apply_fpdt give one document a row: position_ids that restart say that there are several)"
        )
        return (
            f"{what} is not supported with gradients on. Pad on the right with label -100, and {remedy}. Where "
            "nothing is trained, run under torch.no_grad()."
        )
    if needed_bytes > MASK_BYTES_LIMIT:
        return f"{what} would need a mask of {needed_bytes / 2**30:.0f} GiB. Pad on the right, or shorten the input."
    return None


def _left_padding(mask_BT: Tensor) -> str | None:
    """The first row that is padded on its left, in words."""
    padding_B = (mask_BT.cumsum(-1) == 0).sum(-1)
    row = int((padding_B > 0).int().argmax())
    tokens = int(padding_B[row])
    return f"padding on the left (of row {row}, {tokens} of {mask_BT.shape[-1]} tokens)" if tokens else None
