"""`apply_fpdt(model, plugin)`: the layer executor, the chunked loss and the chunked final norm on a model's instance.

Nothing of a class is changed. Each decoder layer gets a subclass of its own class under the same name (accelerate
finds layers by that name), the model and its base get a `forward` of the instance, and `handle.remove()` takes all of
it away.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .ambient import modes_of
from .by_layer import attention_sizes
from .checkpoint_store import CheckpointStore
from .comms import SequenceParallelGroup, build_group, check_heads
from .config import FPDTPlugin
from .fused import fuse_layer
from .head import loss_reasons, patch_head, unshared_loss_reasons
from .interface import NAME
from .layer import run_layer
from .liger import load_liger, why_not_liger
from .memory import ModelSizes
from .optimizers import TrainingMemory
from .patch import (
    Settings,
    arguments_by_name,
    auto_chunk_tokens,
    caches_in,
    check_patched,
    is_patched,
    unpatch,
)
from .progress import StepProgress
from .rates import peak_of
from .run import LayerRun
from .support import check_adapters, why_not_shared, why_unsupported

logger = logging.getLogger(__name__)


def apply_fpdt(
    model: nn.Module, plugin: FPDTPlugin | None = None, group: SequenceParallelGroup | None = None
) -> FPDTHandle:
    """Run `model` chunk by chunk from now on: exact loss and gradients, memory of one chunk.

    Works on a transformers decoder (`PreTrainedModel`, with or without a language-model head), before or after
    `get_peft_model`. The attention implementation becomes "fpdt". With `labels` the model returns the loss and
    `logits=None`; without, full logits as ever. Layers' own gradient checkpointing is switched off: FPDT recomputes
    chunk by chunk already.

    Args:
        model: the model, or the PEFT model around it.
        plugin: settings; None: `FPDTPlugin()`, which reads FPDT_* environment variables.
        group: the ranks that share a sequence; None: `build_group(plugin.sp_size)`. With more than one the model takes
            batches of `ShardingCollator`.

    Returns:
        A handle whose `remove()` restores the model.

    Raises:
        TypeError: `model` is no transformers model.
        RuntimeError: FPDT is applied already.
        NotImplementedError: the model is not supported; every reason is named.
    """
    plugin = FPDTPlugin() if plugin is None else plugin
    target = _transformers_model(model)
    layers = decoder_layers(target)
    if applied_settings(target) is not None:
        raise RuntimeError(
            f"FPDT is applied to this {type(target).__name__} already; call remove() on its handle first."
        )
    if reasons := why_refused(target):
        raise NotImplementedError(f"FPDT cannot run {type(target).__name__}: {'; '.join(reasons)}.")
    group = build_group(plugin.sp_size) if group is None else group
    check_heads(attention_sizes(target.config.get_text_config())[0], group.size)
    if group.size > 1 and (reasons := why_not_shared(target) + unshared_loss_reasons(target)):
        raise NotImplementedError(
            f"FPDT cannot run {type(target).__name__} with sp_size above 1: {'; '.join(reasons)}."
        )
    return FPDTHandle(target, layers, _settings(target, layers, plugin, group))


def _settings(
    model: PreTrainedModel, layers: list[nn.Module], plugin: FPDTPlugin, group: SequenceParallelGroup
) -> Settings:
    config = model.config.get_text_config()
    sizes = ModelSizes.of(config, layers=len(layers), layer_parameters=max(map(_count, layers)))
    store = CheckpointStore(plugin, group, TrainingMemory(model, layers))
    progress = StepProgress(device_peak()) if plugin.progress else None
    liger = load_liger() if plugin.fused else None
    return Settings(plugin, store, group, sizes, model.config, liger, progress)


def device_peak() -> float | None:
    """Operations a second that MFU is measured against, where the GPU is of a known kind."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def mostly_trained(parameters: list[nn.Parameter]) -> bool:
    """Whether weights train, not adapters alone."""
    return 2 * sum(p.numel() for p in parameters if p.requires_grad) > sum(p.numel() for p in parameters)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def applied_settings(model: nn.Module) -> Settings | None:
    """The settings FPDT was applied with to this model, or to the one PEFT or DDP wraps; None where it was not."""
    return next((m._fpdt_settings for m in model.modules() if isinstance(m, _ChunkedLayerMixin)), None)


def train_with(model: nn.Module, optimizer: Any) -> None:
    """The memory that this optimizer will take is left to it, where "auto" settles what is kept on the device.

    Without this AdamW's is. `FPDTTrainer` and `FPDTAccelerator.prepare(model, optimizer)` call it.

    Args:
        model: with FPDT applied; of another one nothing happens.
        optimizer: of its weights, before the first step.
    """
    settings = applied_settings(model)
    if settings is not None:
        settings.store.train_with(optimizer)


def has_fpdt(model: nn.Module, plugin: FPDTPlugin, group: SequenceParallelGroup) -> bool:
    """Whether FPDT is applied to the model, with these settings.

    Raises:
        ValueError: it is applied with others, so batches would be cut in another way than the model expects.
    """
    settings = applied_settings(model)
    if settings is not None and (settings.plugin != plugin or settings.group.size != group.size):
        raise ValueError(
            f"FPDT is applied to this model with {settings.plugin}, but the batches would be cut for {plugin}: pass "
            "the same fpdt_plugin, or leave apply_fpdt to what prepares the model."
        )
    return settings is not None


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrapped: Any = model
    inner = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"apply_fpdt takes a transformers model (or a PEFT model around one), got {type(model).__name__}; apply "
            "it before the model is wrapped by DDP or FSDP."
        )
    return inner


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text decoder, in order; [] where there is no such stack."""
    decoder = model.get_decoder()
    for child in decoder.children() if decoder is not None else ():
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(isinstance(m, GradientCheckpointingLayer) for m in child)
        ):
            return list(child)
    return []


def why_refused(model: PreTrainedModel) -> list[str]:
    """Reasons why `apply_fpdt` will not have this model, each with the way out; [] if it will."""
    return [*why_unsupported(model, decoder_layers(model)), *loss_reasons(model)]


class FPDTHandle:
    """What `apply_fpdt` did to a model; `remove()` undoes it."""

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], settings: Settings) -> None:
        self.model, self.plugin, self.group = model, settings.plugin, settings.group
        self._layers = layers
        # The decoder's alone: a vision tower beside it keeps its own.
        self._decoder: Any = model.get_decoder()
        self._attention_before = self._decoder.config._attn_implementation
        self._settings = settings
        self._decoder.set_attn_implementation(NAME)
        for index, layer in enumerate(layers):
            _enter_layer(layer, settings, index)
        patch_head(model, settings)
        logger.info("hf_fpdt: %s", self)

    @property
    def store(self) -> CheckpointStore:
        """Where checkpoints, K and V lie, and what the steps so far take."""
        return self._settings.store

    def __str__(self) -> str:
        p = self.plugin
        gpu, cpu = (f"{auto_chunk_tokens(p.sp_size, on_gpu=on_gpu):,}" for on_gpu in (True, False))
        chunk = f"{gpu} tokens on a GPU, {cpu} on a CPU" if p.chunk_tokens == "auto" else f"{p.chunk_tokens:,} tokens"
        return (
            f"{type(self.model).__name__}, {len(self._layers)} layers in chunks of {chunk}; kernel {p.kernel!r}; "
            f"checkpoints {p.checkpoints!r}; loss in chunks of "
            f"{self._settings.loss_chunk_tokens(self.model.config):,} tokens; {self._fused()}"
        )

    def _fused(self) -> str:
        if not self.plugin.fused:
            return "layers as the model has them"
        why_not = why_not_liger()
        return f"LoRA fused, {'Liger kernels' if why_not is None else f'no Liger kernels: {why_not}'}"

    def remove(self) -> None:
        """Restore the model exactly; a second call does nothing.

        Raises:
            RuntimeError: something else replaced a forward or wrapped a layer since; undo that first.
        """
        if not self._layers:
            return
        # Not a list made at the start: PEFT's modules_to_save copies modules, patch and all.
        patched = [module for module in self.model.modules() if is_patched(module)]
        for module in patched:
            check_patched(module)
        for layer in self._layers:
            _check_entered(layer)
        for module in patched:
            unpatch(module)
        for layer in self._layers:
            _leave_layer(layer)
        self._settings.store.close()
        if self._settings.progress is not None:
            self._settings.progress.close()
        self._decoder.set_attn_implementation(self._attention_before)
        self._layers = []


# -- layers -----------------------------------------------------------------------------------------------------------


class _ChunkedLayerMixin(nn.Module):
    """Mixed into the class of each decoder layer; `_fpdt_*` are set by `_enter_layer`."""

    _fpdt_settings: Settings
    _fpdt_name: str
    _fpdt_index: int
    _fpdt_class: Any
    _fpdt_checkpointing: bool | None  # None: never asked for, on this instance

    @property
    def gradient_checkpointing(self) -> bool:
        """Always off: chunks are recomputed one by one already. What was asked for is kept for `remove()`."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._fpdt_checkpointing = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, chunk by chunk; as it is for generation with a cache."""
        raw = _raw_forward(self._fpdt_class)
        arguments = arguments_by_name(_signature(raw), self, *args, **kwargs)
        name = next(iter(arguments))
        hidden = arguments.pop(name)
        if _needs_whole_sequence(self, arguments):
            return raw(self, hidden, **arguments)
        _check_arguments(arguments, hidden, self._fpdt_name)
        check_adapters(self, self._fpdt_name)
        settings, parameters = self._fpdt_settings, list(self.parameters())
        if settings.plugin.fused:
            fuse_layer(self, raw, settings)
        run = LayerRun(
            name=self._fpdt_name,
            index=self._fpdt_index,
            forward=functools.partial(raw, self),
            kwargs=arguments,
            step=settings.step(hidden),
            kernel=settings.plugin.kernel,
            store=settings.store,
            group=settings.group,
            weights=functools.partial(_whole_weights, self),
            modes=functools.partial(modes_of, self),
            sharded=hasattr(self, "unshard"),
            progress=settings.progress,
            full=settings.progress is not None and mostly_trained(parameters),
        )
        return run_layer(run, hidden, parameters)


@contextmanager
def _whole_weights(layer: Any) -> Iterator[None]:
    """FSDP2's layers are gathered for their own forward and backward pass alone; elsewhere they are asked to be."""
    sharded = hasattr(layer, "unshard")
    if sharded:
        layer.unshard()
    try:
        yield
    finally:
        if sharded:
            layer.reshard()


def _enter_layer(layer: Any, settings: Settings, index: int) -> None:
    original: Any = type(layer)
    checkpointing = layer.__dict__.pop("gradient_checkpointing", None)
    layer.__class__ = _chunked_class(original)
    layer._fpdt_settings = settings
    layer._fpdt_name, layer._fpdt_index = f"layer {index} ({original.__name__})", index
    layer._fpdt_class, layer._fpdt_checkpointing = original, checkpointing


def _check_entered(layer: Any) -> None:
    if type(layer) is not _chunked_class(layer._fpdt_class):
        raise RuntimeError(f"{layer._fpdt_name} was wrapped after apply_fpdt (FSDP2?); it cannot be restored now.")


def _leave_layer(layer: Any) -> None:
    original, checkpointing = layer._fpdt_class, layer._fpdt_checkpointing
    for name in [name for name in layer.__dict__ if name.startswith("_fpdt_")]:
        delattr(layer, name)
    layer.__class__ = original
    if checkpointing is not None:
        layer.gradient_checkpointing = checkpointing


@functools.lru_cache
def _chunked_class(original: Any) -> type[nn.Module]:
    return type(original.__name__, (_ChunkedLayerMixin, original), {"__module__": original.__module__})


@functools.lru_cache
def _raw_forward(layer_class: Any) -> Callable[..., Any]:
    """The layer's forward without the checkpointing wrapper that newer transformers put around it."""
    forward = layer_class.forward
    wrapped = forward.__code__.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if wrapped else forward


# Asked for in every layer of every generated token; a class's forward does not change.
_signature = functools.lru_cache(inspect.signature)


def _needs_whole_sequence(layer: nn.Module, arguments: dict[str, Any]) -> bool:
    """Generation with a cache, or evaluation under a mask: the layer runs as it is, over the bare attention function.

    In training an empty cache is dropped, as transformers' own checkpointing does. Without gradients nothing is
    trained, whatever mode the layer is in: samples may be generated between two steps.
    """
    for name in caches_in(arguments):
        if not (layer.training and torch.is_grad_enabled()):
            return True
        if arguments[name].get_seq_length() > 0:
            raise NotImplementedError(
                "fpdt: training behind a filled cache (prefix tuning?) is not supported; use LoRA or full fine-tuning."
            )
        arguments |= {name: None, "use_cache": False}
    return arguments.get("attention_mask") is not None and not torch.is_grad_enabled()


def _check_arguments(arguments: dict[str, Any], hidden: Tensor, name: str) -> None:
    """Refuse what a chunk cannot be given a part of: masks, and tensors whose token axis is not where it should be."""
    n_tokens = hidden.shape[1]
    for key, value in arguments.items():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            why = _why_not_sliced(key, tensor, n_tokens) if isinstance(tensor, Tensor) else None
            if why is not None:
                raise NotImplementedError(f"fpdt: {name} got {key!r} of shape {tuple(tensor.shape)}: {why}")


def _why_not_sliced(key: str, value: Tensor, n_tokens: int) -> str | None:
    if key == "attention_mask":
        return "masks are not supported in training; pad on the right with label -100 and pass no 4-D mask."
    if value.requires_grad:
        return "only hidden states may carry a gradient into a layer."
    elsewhere = [axis for axis, size in enumerate(value.shape) if size == n_tokens > 1 and axis != 1]
    if value.dim() > 1 and elsewhere and value.shape[1] != n_tokens:
        return f"its token axis is {elsewhere[0]}, but only axis 1 is cut in chunks."
    return None
