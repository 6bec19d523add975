"""What the patched modules of one model share."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import SCORE_BYTES, select_kernel, why_not_served
from ..config import FPDTPlugin, resolve_chunk_tokens
from ..engine import Asked, LayerTrials, StepProgress
from ..layout import ChunkPlan, Documents, chunk_choices
from ..memory import CheckpointStore
from ..parallel import SequenceParallelGroup
from ..plan import KEEPS_LINEARS, LinearSize, ModelSizes, StepSizes
from .liger import Liger
from .weights.host import HostWeights

logger = logging.getLogger(__name__)
LOGITS_BYTES = 2**30
# Tokens that the kernels of recurrences go through at a time are divisors of it.
KERNEL_BLOCK = 256
# What autocast computes in.
HALF = (torch.bfloat16, torch.float16)
PLAIN_PYTORCH = (
    "hf_fpdt: no kernel that is here serves attention of %s in %s on %s, so it is done in plain PyTorch, exactly and "
    "many times slower. `hf-fpdt check` says why of each kernel; flash-attn-4 (pip install flash-attn-4) serves most "
    "kinds from Hopper on, the package flash-attn from Ampere on."
)


@dataclass
class Settings:
    """What the patched modules of one model share.

    Attributes:
        trials: which layers were tried.
        chunks: tokens of a chunk that "auto" came to, by rows and tokens of hidden states and by their dtype.
        fused_experts: whether chosen experts run as one operation.
        between: whether a pass that scores tokens may have another one (a reference's) before its backward pass.
        awaited: whether there was such a pass: from then on there is room for both.
        packed: of the last batch with gradients its shape and the documents of its packed row; None: it had none.
        padding_tried: whether a head that is no language model's was found not to read padding.
        asked: what layers ask of attention, each kind once; () where that is not known before the first step.
        host_weights: where layers' frozen weights wait; None: on the device.
        plain: of devices and dtypes those on which kernels were looked for, and whether there was but plain PyTorch.
    """

    plugin: FPDTPlugin
    store: CheckpointStore
    group: SequenceParallelGroup
    sizes: ModelSizes
    config: Any
    liger: Liger | None = None
    progress: StepProgress | None = None
    fused_experts: bool = False
    between: bool = True
    awaited: bool = False
    trials: LayerTrials = field(default_factory=LayerTrials)
    chunks: dict[tuple[object, ...], int] = field(default_factory=dict)
    padding_tried: bool = False
    packed: tuple[tuple[int, ...], Documents] | None = None
    asked: tuple[Asked, ...] = ()
    host_weights: HostWeights | None = None
    plain: dict[tuple[str, torch.dtype], bool] = field(default_factory=dict)

    def kept_linears(self, layer: int) -> tuple[LinearSize, ...]:
        """The linears of a layer whose outputs the policy of checkpoints may keep."""
        return self.sizes.linears_of(layer) if self.plugin.checkpoints in KEEPS_LINEARS else ()

    def why_not_served(self, devices: Sequence[torch.device], dtypes: Sequence[torch.dtype] = HALF) -> str | None:
        """Why the named kernel serves something that a layer asks on none of the devices; None where it serves all.

        Args:
            dtypes: those that queries may have beside the one in which they were seen; by default autocast's.
        """
        reasons = (why_not_served(self.plugin.kernel, _cases(devices, dtypes, a), a.spec) for a in self.asked)
        return next((reason for reason in reasons if reason is not None), None)

    def check_kernel(self, device: torch.device, weights: torch.dtype, *, is_sharded: bool) -> None:
        """Before the first layer of a step, once for each device and dtype: does the kernel serve what layers ask?

        Where plain PyTorch takes the place of a GPU's kernels, it is said, and its scores are planned for.

        Args:
            weights: their dtype.
            is_sharded: whether FSDP2 shards layers, and may have a dtype of its own for them.

        Raises:
            NotImplementedError: the named kernel does not.
        """
        narrow = torch.is_autocast_enabled(device.type) and weights == torch.float32
        dtype = torch.get_autocast_dtype(device.type) if narrow else weights
        if (case := (device.type, dtype)) in self.plain:
            return
        dtypes = (dtype, *(HALF if is_sharded else ()))
        if (reason := self.why_not_served([device], dtypes)) is not None:
            raise NotImplementedError(f"hf_fpdt: {reason}.")
        kinds = [asked.spec for asked in self.asked if self._is_plain(asked, device, dtypes)]
        self.plain[case] = bool(kinds)
        if kinds and self.plugin.kernel == "auto":
            logger.warning(PLAIN_PYTORCH, kinds[0], dtype, device.type)

    def _is_plain(self, asked: Asked, device: torch.device, dtypes: Sequence[torch.dtype]) -> bool:
        if device.type == "cpu" or self.plugin.kernel not in ("auto", "math"):
            return False
        cases = _cases([device], dtypes, asked)
        return {select_kernel(self.plugin.kernel, *case, asked.spec).name for case in cases} == {"math"}

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
        is_plain = self.plain.get((kind, torch.get_autocast_dtype(kind) if narrow else dtype), False)
        return StepSizes(
            self.sizes,
            ChunkPlan(hidden_BSD.shape[1] * self.group.size, chunk_tokens, self.group.size),
            batch=hidden_BSD.shape[0],
            element_bytes=dtype.itemsize,
            attention_bytes=torch.get_autocast_dtype(kind).itemsize if narrow else dtype.itemsize,
            loss_tokens=self.loss_chunk_tokens(self.config),
            vocabulary=self.config.get_text_config().vocab_size,
            fused=self.liger is not None and hidden_BSD.is_cuda,
            score_bytes=SCORE_BYTES * is_plain,
            fused_experts=self.fused_experts,
            awaited=self.awaited,
        )

    @property
    def recurrent(self) -> bool:
        """Whether some layer carries a state."""
        return any(mix.states for mix in self.sizes.mixes)

    def plan(self, hidden_BSD: Tensor) -> ChunkPlan:
        """The cut of the sequence of which this rank holds `hidden_BSD`."""
        plan = self.plan_of(hidden_BSD.shape[1], on_gpu=hidden_BSD.is_cuda)
        return replace(plan, chunk_tokens=self.chunks.get(_shape(hidden_BSD), plan.chunk_tokens))

    def plan_of(self, rank_tokens: int, *, on_gpu: bool) -> ChunkPlan:
        """The cut of the sequence of which each rank holds `rank_tokens`."""
        chunk_tokens, n_tokens = resolve_chunk_tokens(self.plugin, on_gpu=on_gpu), rank_tokens * self.group.size
        if self.recurrent:
            # Kernels of scans go through blocks; borders that are theirs too give the numbers of the whole.
            alone = on_gpu and self.group.size == 1 and chunk_tokens > KERNEL_BLOCK
            chunk_tokens -= chunk_tokens % KERNEL_BLOCK if alone else 0
            chunk_tokens = no_single_token(n_tokens, chunk_tokens, self.group.size)
        return ChunkPlan(n_tokens, chunk_tokens, self.group.size)

    def loss_chunk_tokens(self, config: Any) -> int:
        """Tokens whose logits exist at a time."""
        if self.plugin.loss_chunk_tokens != "auto":
            return self.plugin.loss_chunk_tokens
        return auto_loss_tokens(config.get_text_config().vocab_size)


def no_single_token(n_tokens: int, chunk_tokens: int, sp_size: int = 1) -> int:
    """Tokens of a chunk, a little fewer where the last chunk would be of one token; more where no fewer will do.

    Recurrent layers take a single token by a way of its own, for decoding: it writes states in place, and its kernels
    have no backward pass. Borders stay multiples of 256 where they were, so that a kernel's inner blocks do.

    Raises:
        ValueError: each of several ranks would have one token of the last chunk; the batch was cut before.
    """
    if sp_size > 1 and n_tokens % chunk_tokens == sp_size:
        raise ValueError(
            f"hf_fpdt: of {n_tokens:,} tokens in chunks of {chunk_tokens:,} the last chunk leaves each of {sp_size} "
            "ranks a single token, which recurrent layers take as one to be decoded: pad the sequence by "
            f"{sp_size} tokens (ShardingCollator(two_each=True) does), or choose another chunk_tokens."
        )
    asked = chunk_tokens
    while n_tokens > chunk_tokens > 1 and n_tokens % chunk_tokens == 1:
        chunk_tokens -= KERNEL_BLOCK if chunk_tokens % KERNEL_BLOCK == 0 < chunk_tokens - KERNEL_BLOCK else 1
    if sp_size == 1 and chunk_tokens == 1 < n_tokens:  # an odd sequence in twos, or chunks of one that were asked for
        return next(more for more in itertools.count(max(2, asked)) if n_tokens <= more or n_tokens % more != 1)
    return chunk_tokens


def _cases(
    devices: Sequence[torch.device], dtypes: Sequence[torch.dtype], asked: Asked
) -> list[tuple[torch.device, torch.dtype]]:
    return [(device, dtype) for device in devices for dtype in dict.fromkeys((*dtypes, asked.dtype))]


def _shape(hidden_BSD: Tensor) -> tuple[object, ...]:
    return (*hidden_BSD.shape[:2], hidden_BSD.dtype, hidden_BSD.device)


def auto_loss_tokens(vocabulary: int) -> int:
    """A power of two whose fp32 logits fill at most 1 GiB, and at least 256."""
    tokens = LOGITS_BYTES // (4 * vocabulary)
    return max(256, 2 ** (tokens.bit_length() - 1))
