"""The loss of hf-offload: as TRL's SFTTrainer has it for long context (`loss_type="chunked_nll"`, TRL 1.13).

TRL is not a dependency, and its loss is private to its trainer; this is the smallest equivalent: 256 tokens at a time,
each chunk's logits made in the model's dtype, the softmax in fp32, logits made again in the backward pass. TRL also
counts right tokens and entropy for its log; that is left out, which makes this one a little faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ....labels import IGNORE_INDEX

CHUNK_TOKENS = 256


def chunked_nll(hidden_BSD: Tensor, head: Any, labels_BS: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Mean next-token loss of hidden states; labels of -100 do not count.

    Args:
        hidden_BSD: the decoder's output, before the head.
        head: the model's output embeddings.
        labels_BS: not shifted.
        chunk_tokens: tokens whose logits exist at a time.
    """
    hidden = hidden_BSD[:, :-1].reshape(-1, hidden_BSD.shape[-1])
    labels = labels_BS[:, 1:].reshape(-1)
    return chunked_sum(hidden, head, labels, chunk_tokens) / (labels != IGNORE_INDEX).sum().clamp(min=1)


def chunked_sum(hidden_TD: Tensor, head: Any, labels_T: Tensor, chunk_tokens: int) -> Tensor:
    """The summed loss of T tokens, each with its own label; -100 does not count."""
    kept = labels_T != IGNORE_INDEX
    hidden, labels = hidden_TD[kept], labels_T[kept]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total = total + checkpoint(_chunk, hidden[part], head, labels[part], use_reentrant=False)
    return total


def _chunk(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    return summed_loss(head(hidden), labels)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in at least fp32, added up over tokens."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
