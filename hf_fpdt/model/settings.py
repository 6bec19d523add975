"""What the patched modules of one model share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import FPDTPlugin, resolve_chunk_tokens
from ..engine import LayerTrials, StepProgress
from ..layout import ChunkPlan, chunk_choices
from ..memory import CheckpointStore
from ..parallel import SequenceParallelGroup
from ..plan import ModelSizes, StepSizes
from .liger import Liger

logger = logging.getLogger(__name__)
LOGITS_BYTES = 2**30
# Tokens that the kernels of recurrences go through at a time are divisors of it.
KERNEL_BLOCK = 256


@dataclass
class Settings:
    """What the patched modules of one model share.

    Attributes:
        trials: which layers were tried.
        chunks: tokens of a chunk that "auto" came to, by rows and tokens of hidden states and by their dtype.
        padding_tried: whether a head that is no language model's was found not to read padding.
    """

    plugin: FPDTPlugin
    store: CheckpointStore
    group: SequenceParallelGroup
    sizes: ModelSizes
    config: Any
    liger: Liger | None = None
    progress: StepProgress | None = None
    trials: LayerTrials = field(default_factory=LayerTrials)
    chunks: dict[tuple[object, ...], int] = field(default_factory=dict)
    padding_tried: bool = False

    def step(self, hidden_BSD: Tensor, *, is_sharded: bool = False) -> StepSizes:
        """Sizes of the step in which a layer gets `hidden_BSD`; settles the chunk that "auto" is in such steps.

        Args:
            is_sharded: whether FSDP2 shards layers. Then all ranks must keep the same of them, whatever their lengths,
                so none of them chooses a chunk of its own.
        """
        key, most = _shape(hidden_BSD), self.plan(hidden_BSD).chunk_tokens
        # Over ranks that share a sequence the collator has cut it before the model sees it.
        alone = self.group.size == 1 and not is_sharded
        if key not in self.chunks and self.plugin.chunk_tokens == "auto" and alone:
            tried = (self._step(hidden_BSD, size) for size in chunk_choices(most))
            steps = [step for step in tried if self.store.has_room(step, hidden_BSD.device)][:1]
            self.chunks[key] = steps[0].plan.chunk_tokens if steps else most
            if self.chunks[key] < most:
                logger.info("hf_fpdt: chunks of %s tokens, the largest with which a step fits", self.chunks[key])
        return self._step(hidden_BSD, self.plan(hidden_BSD).chunk_tokens)

    def _step(self, hidden_BSD: Tensor, chunk_tokens: int) -> StepSizes:
        kind, dtype = hidden_BSD.device.type, hidden_BSD.dtype
        narrow = torch.is_autocast_enabled(kind) and dtype == torch.float32
        return StepSizes(
            self.sizes,
            ChunkPlan(hidden_BSD.shape[1] * self.group.size, chunk_tokens, self.group.size),
            batch=hidden_BSD.shape[0],
            element_bytes=dtype.itemsize,
            attention_bytes=torch.get_autocast_dtype(kind).itemsize if narrow else dtype.itemsize,
            loss_tokens=self.loss_chunk_tokens(self.config),
            vocabulary=self.config.get_text_config().vocab_size,
            fused=self.liger is not None and hidden_BSD.is_cuda,
        )

    def plan(self, hidden_BSD: Tensor) -> ChunkPlan:
        """The cut of the sequence of which this rank holds `hidden_BSD`."""
        plan = self.plan_of(hidden_BSD.shape[1], on_gpu=hidden_BSD.is_cuda)
        return replace(plan, chunk_tokens=self.chunks.get(_shape(hidden_BSD), plan.chunk_tokens))

    def plan_of(self, rank_tokens: int, *, on_gpu: bool) -> ChunkPlan:
        """The cut of the sequence of which each rank holds `rank_tokens`."""
        chunk_tokens, n_tokens = resolve_chunk_tokens(self.plugin, on_gpu=on_gpu), rank_tokens * self.group.size
        if any(mix.states for mix in self.sizes.mixes):
            chunk_tokens = no_single_token(n_tokens, chunk_tokens, self.group.size)
        return ChunkPlan(n_tokens, chunk_tokens, self.group.size)

    def loss_chunk_tokens(self, config: Any) -> int:
        """Tokens whose logits exist at a time."""
        if self.plugin.loss_chunk_tokens != "auto":
            return self.plugin.loss_chunk_tokens
        return auto_loss_tokens(config.get_text_config().vocab_size)


def no_single_token(n_tokens: int, chunk_tokens: int, sp_size: int = 1) -> int:
    """Tokens of a chunk, a little fewer where the last chunk would be of one token.

    Recurrent layers take a single token by a way of its own, for decoding: it writes states in place, and its kernels
    have no backward pass. Borders stay multiples of 256 where they were, so that a kernel's inner blocks do.

    Raises:
        ValueError: each of several ranks would have one token of the last chunk; the batch was cut before.
    """
    if sp_size > 1 and n_tokens % chunk_tokens == sp_size:
        raise ValueError(
            f"hf_fpdt: of {n_tokens:,} tokens in chunks of {chunk_tokens:,} the last chunk leaves each of {sp_size} "
            "ranks a single token, which recurrent layers take as one to be decoded: pad the sequence by "
            f"{sp_size} tokens (label -100), or choose another chunk_tokens."
        )
    while n_tokens > chunk_tokens > 2 and n_tokens % chunk_tokens == 1:
        chunk_tokens -= KERNEL_BLOCK if chunk_tokens % KERNEL_BLOCK == 0 < chunk_tokens - KERNEL_BLOCK else 1
    return chunk_tokens


def _shape(hidden_BSD: Tensor) -> tuple[object, ...]:
    return (*hidden_BSD.shape[:2], hidden_BSD.dtype, hidden_BSD.device)


def auto_loss_tokens(vocabulary: int) -> int:
    """A power of two whose fp32 logits fill at most 1 GiB, and at least 256."""
    tokens = LOGITS_BYTES // (4 * vocabulary)
    return max(256, 2 ** (tokens.bit_length() - 1))
