"""What the patched modules of one model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import FPDTPlugin, resolve_chunk_tokens
from ..engine import LayerTrials, StepProgress
from ..layout import ChunkPlan
from ..memory import CheckpointStore
from ..parallel import SequenceParallelGroup
from ..plan import ModelSizes, StepSizes
from .liger import Liger

LOGITS_BYTES = 2**30


@dataclass
class Settings:
    """What the patched modules of one model share.

    Attributes:
        trials: which layers were tried.
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
    padding_tried: bool = False

    def step(self, hidden_BSD: Tensor) -> StepSizes:
        """Sizes of the step in which a layer gets `hidden_BSD`."""
        kind, dtype = hidden_BSD.device.type, hidden_BSD.dtype
        narrow = torch.is_autocast_enabled(kind) and dtype == torch.float32
        return StepSizes(
            self.sizes,
            self.plan(hidden_BSD),
            batch=hidden_BSD.shape[0],
            element_bytes=dtype.itemsize,
            attention_bytes=torch.get_autocast_dtype(kind).itemsize if narrow else dtype.itemsize,
            loss_tokens=self.loss_chunk_tokens(self.config),
            vocabulary=self.config.get_text_config().vocab_size,
            fused=self.liger is not None and hidden_BSD.is_cuda,
        )

    def plan(self, hidden_BSD: Tensor) -> ChunkPlan:
        """The cut of the sequence of which this rank holds `hidden_BSD`."""
        return self.plan_of(hidden_BSD.shape[1], on_gpu=hidden_BSD.is_cuda)

    def plan_of(self, rank_tokens: int, *, on_gpu: bool) -> ChunkPlan:
        """The cut of the sequence of which each rank holds `rank_tokens`."""
        chunk_tokens = resolve_chunk_tokens(self.plugin, on_gpu=on_gpu)
        return ChunkPlan(rank_tokens * self.group.size, chunk_tokens, self.group.size)

    def loss_chunk_tokens(self, config: Any) -> int:
        """Tokens whose logits exist at a time."""
        if self.plugin.loss_chunk_tokens != "auto":
            return self.plugin.loss_chunk_tokens
        return auto_loss_tokens(config.get_text_config().vocab_size)


def auto_loss_tokens(vocabulary: int) -> int:
    """A power of two whose fp32 logits fill at most 1 GiB, and at least 256."""
    tokens = LOGITS_BYTES // (4 * vocabulary)
    return max(256, 2 ** (tokens.bit_length() - 1))
