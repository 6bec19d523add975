"""Replacing the `forward` of one module instance, and taking the replacement away again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .checkpoint_store import CheckpointStore
from .comms import SequenceParallelGroup
from .config import FPDTPlugin
from .layout import ChunkPlan
from .liger import Liger
from .memory import ModelSizes, StepSizes
from .progress import StepProgress
from .trial import LayerTrials

AUTO_CHUNK_TOKENS_GPU = 32_768
AUTO_RANK_TOKENS_GPU = 8_192
AUTO_CHUNK_TOKENS_CPU = 4_096
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


def resolve_chunk_tokens(plugin: FPDTPlugin, *, on_gpu: bool) -> int:
    """Global tokens a chunk; "auto" is resolved by device, down to a multiple of `sp_size`."""
    if plugin.chunk_tokens != "auto":
        return plugin.chunk_tokens
    return auto_chunk_tokens(plugin.sp_size, on_gpu=on_gpu)


def auto_chunk_tokens(sp_size: int, *, on_gpu: bool) -> int:
    """Global tokens a chunk for "auto": on GPUs enough that each has 8,192 of them for its matrix products."""
    chunk_tokens = max(AUTO_CHUNK_TOKENS_GPU, AUTO_RANK_TOKENS_GPU * sp_size) if on_gpu else AUTO_CHUNK_TOKENS_CPU
    return chunk_tokens - chunk_tokens % sp_size


@dataclass
class Patch:
    """Left on a patched module as `_fpdt`: what its new forward needs, and what was there before.

    Attributes:
        value: of a linear, what becomes of its output (`linear.Value`), where that is known now.
    """

    settings: Settings
    forward: Callable[..., Any]
    signature: inspect.Signature
    instance_forward: Callable[..., Any] | None
    value: Any = None


def patch(module: Any, forward: Callable[..., Any], settings: Settings) -> None:
    """Make `forward(module, *args, **kwargs)` the forward of this instance; it finds the old one in `module._fpdt`."""

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    # Trainer and accelerate read the signature to decide which columns of a batch to pass. `__wrapped__` would not do:
    # accelerate unwinds it, past this patch.
    shown = inspect.signature(module.forward)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    patched.__signature__ = shown.replace(parameters=[own, *shown.parameters.values()])  # type: ignore[attr-defined]
    patched._fpdt_patch = True  # type: ignore[attr-defined]
    module._fpdt = Patch(settings, module.forward, shown, module.__dict__.get("forward"))
    module.forward = MethodType(patched, module)


def is_patched(module: Any) -> bool:
    """Whether `patch` was applied to this instance, or to the one it was copied from."""
    return "_fpdt" in vars(module)


def check_patched(module: Any) -> None:
    """Raise RuntimeError unless the instance's forward is still the one `patch` put there."""
    present = module.__dict__.get("forward")
    if not hasattr(getattr(present, "__func__", None), "_fpdt_patch"):
        raise RuntimeError(
            f"{type(module).__name__}.forward was replaced after apply_fpdt (by accelerate, Liger, …); undo that "
            "first, for accelerate by accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )


def unpatch(module: Any) -> None:
    """Undo `patch`."""
    before = module._fpdt.instance_forward
    del module.forward, module._fpdt
    if before is not None:
        module.forward = before


# What transformers calls a cache since 5.24, and called it before: its forwards warn of the old names.
CACHE, OLD_CACHE_NAMES = "cache", ("past_key_values", "cache_params")


def caches_in(arguments: dict[str, Any]) -> list[str]:
    """The names of the arguments that are caches of keys and values; told from what they can do, not from the name."""
    return [name for name, value in arguments.items() if hasattr(value, "get_seq_length")]


def arguments_by_name(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments by name, `**kwargs` merged in, a cache by the name it has now; a leading `self` is left out."""
    if CACHE in signature.parameters:
        for name in OLD_CACHE_NAMES:
            if name in kwargs and name not in signature.parameters:
                kwargs[CACHE] = kwargs.pop(name)
    arguments = signature.bind(*args, **kwargs).arguments
    variadic = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    merged = {key: value for key, value in arguments.items() if key not in ("self", *variadic)}
    return merged | {key: value for name in variadic for key, value in arguments.get(name, {}).items()}
