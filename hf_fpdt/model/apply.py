"""`apply_fpdt(model, plugin)`: the layer executor, the chunked loss and the chunked final norm on a model's instance.

Nothing of a class is changed. Each decoder layer gets a subclass of its own class under the same name (accelerate
finds layers by that name), the model and its base get a `forward` of the instance, and `handle.remove()` takes all of
it away.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import FPDTPlugin, auto_chunk_tokens
from ..engine import Asked, StepProgress, scan_packages
from ..forecast import peak_of
from ..memory import CheckpointStore, TrainingMemory
from ..parallel import SequenceParallelGroup, build_group, check_heads
from ..plan import ModelSizes, attention_sizes
from .adapters import warn_of_another_rope
from .attention_function import NAME
from .experts.replace import experts_are_replaced
from .head import loss_reasons, patch_head, unshared_loss_reasons
from .layers import (
    ChunkedLayer,
    check_entered,
    decoder_layers,
    decoder_of,
    enter_layer,
    leave_layer,
)
from .liger import load_liger, why_not_liger
from .patch import check_patched, is_patched, unpatch
from .refusals import why_not_shared, why_unsupported
from .settings import Settings
from .trial import ask_layers
from .weights.counts import merged_weights
from .weights.host import put_on_host
from .weights.quantised import shape_of, whole_sizes

logger = logging.getLogger(__name__)


def apply_fpdt(
    model: nn.Module, plugin: FPDTPlugin | None = None, group: SequenceParallelGroup | None = None
) -> FPDTHandle:
    """Run `model` chunk by chunk from now on: exact loss and gradients, memory of one chunk.

    Works on a transformers decoder (`PreTrainedModel`, with or without a language-model head), before or after
    `get_peft_model`. The attention implementation becomes "fpdt". With `labels` the model returns the loss and
    `logits=None`; without, full logits as ever. Layers' own gradient checkpointing is switched off: FPDT recomputes
    chunk by chunk already. An adapter of `hf-fpdt finetune` on a base of other rotary parameters is warned of.

    Args:
        model: the model, or the PEFT model around it.
        plugin: settings; None: `FPDTPlugin()`, which reads FPDT_* environment variables.
        group: the ranks that share a sequence; None: `build_group(plugin.sp_size)`. With more than one the model takes
            batches of `ShardingCollator`; `chunked_log_probs` and TRL's trainers give it whole rows.

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
            f"hf_fpdt: FPDT is applied to this {type(target).__name__} already; call remove() on its handle first."
        )
    if reasons := why_refused(target):
        raise NotImplementedError(f"hf_fpdt: FPDT cannot run {type(target).__name__}: {'; '.join(reasons)}.")
    group = build_group(plugin.sp_size) if group is None else group
    heads = attention_sizes(target.config.get_text_config())
    if heads.head_dim:  # none of a model without attention
        check_heads(heads.q_heads, group.size)
    if group.size > 1 and (reasons := why_not_shared(target) + unshared_loss_reasons(target)):
        raise NotImplementedError(
            f"hf_fpdt: FPDT cannot run {type(target).__name__} with sp_size above 1: {'; '.join(reasons)}."
        )
    settings = _settings(target, layers, plugin, group)
    handle = FPDTHandle(target, layers, settings)
    try:
        ask_layers(target, layers, settings)
        if plugin.host_weights and (host := put_on_host(target, layers)) is not None:
            settings.host_weights, settings.sizes = host, replace(settings.sizes, fetched_bytes=host.largest)
    except MemoryError:
        handle.remove()
        raise
    except NotImplementedError as error:
        handle.remove()
        why = str(error).removeprefix("hf_fpdt: ")
        raise NotImplementedError(f"hf_fpdt: FPDT cannot run {type(target).__name__}: {why}") from error
    warn_of_another_rope(target)
    _warn_of_plain_scans(target)
    return handle


def _warn_of_plain_scans(model: PreTrainedModel) -> None:
    """On a GPU PyTorch's path of a scan is exact, takes many times as long, and more memory than is planned."""
    if model.device.type != "cuda":
        return
    plain = [name for name, package in scan_packages(model).items() if package is None]
    if plain:
        logger.warning(
            "hf_fpdt: no kernel is installed for %s, so plain PyTorch computes it: exact, much slower, and with more "
            'memory than is planned for. pip install "hf_fpdt[recurrent]", for Mamba-2 mamba-ssm.',
            ", ".join(plain),
        )


def seen_of(model: PreTrainedModel) -> tuple[ModelSizes, tuple[Asked, ...]]:
    """Sizes of a model whose weights have no memory, and what its layers ask of attention, each kind once.

    Returns:
        Where they cannot be asked, sizes by the configuration alone and ().

    Raises:
        NotImplementedError: the model is not supported.
    """
    handle = apply_fpdt(model, FPDTPlugin(sp_size=1, kernel="auto", progress=False))
    settings = handle._settings
    handle.remove()
    return settings.sizes, settings.asked


def _settings(
    model: PreTrainedModel, layers: list[nn.Module], plugin: FPDTPlugin, group: SequenceParallelGroup
) -> Settings:
    config = model.config.get_text_config()
    sizes = ModelSizes.of(config, layers=len(layers), layer_parameters=max(map(_count, layers)))
    whole, itemsize = whole_sizes(layers)
    sizes = replace(sizes, merged=merged_weights(layers), whole_weights=whole, whole_itemsize=itemsize)
    store = CheckpointStore(plugin, group, TrainingMemory(model, layers))
    progress = StepProgress(device_peak()) if plugin.progress else None
    liger = load_liger() if plugin.fused else None
    fused_experts = plugin.fused and experts_are_replaced(layers)
    return Settings(plugin, store, group, sizes, model.config, liger, progress, fused_experts)


def device_peak() -> float | None:
    """Operations a second that MFU is measured against, where the GPU is of a known kind."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _count(module: nn.Module) -> int:
    return sum(shape_of(parameter).numel() for parameter in module.parameters())


def applied_settings(model: nn.Module) -> Settings | None:
    """The settings FPDT was applied with to this model, or to the one PEFT or DDP wraps; None where it was not."""
    return next((m._fpdt_settings for m in model.modules() if isinstance(m, ChunkedLayer)), None)


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
            f"hf_fpdt: FPDT is applied to this model with {settings.plugin}, but the batches would be cut for "
            f"{plugin}: pass the same fpdt_plugin, or leave apply_fpdt to what prepares the model."
        )
    return settings is not None


def waiting_names(model: nn.Module) -> list[str]:
    """Names of the weights that wait on the host; [] where none does."""
    settings = applied_settings(model)
    own = set() if settings is None or settings.host_weights is None else settings.host_weights.own()
    return [name for name, weight in model.named_parameters() if id(weight) in own and not weight.requires_grad]


def may_get_fpdt(model: nn.Module) -> bool:
    """Whether a model that is only asked, never trained, can have FPDT too; it is as exact without."""
    unwrapped: Any = model
    inner = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel) or applied_settings(inner) is not None or why_refused(inner):
        return False
    return not any(hasattr(layer, "unshard") for layer in decoder_layers(inner))  # FSDP2 has it


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrapped: Any = model
    inner = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "hf_fpdt: apply_fpdt takes a transformers model (or a PEFT model around one), got "
            f"{type(model).__name__}; apply it before the model is wrapped by DDP or FSDP."
        )
    return inner


def why_refused(model: PreTrainedModel) -> list[str]:
    """Reasons why `apply_fpdt` will not have this model, each with the way out; [] if it will."""
    return [*why_unsupported(model, decoder_layers(model)), *loss_reasons(model)]


class FPDTHandle:
    """What `apply_fpdt` did to a model; `remove()` undoes it."""

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], settings: Settings) -> None:
        self.model, self.plugin, self.group = model, settings.plugin, settings.group
        self._layers = list(dict.fromkeys(layers))  # a model may go through a layer twice
        # The decoder's alone: a vision tower beside it keeps its own.
        self._decoder: Any = decoder_of(model)
        self._attention_before = self._decoder.config._attn_implementation
        self._settings = settings
        self._decoder.set_attn_implementation(NAME)
        # PEFT's layer_replication and modules_to_save copy attention modules, with configurations of their own.
        self._copies = [
            (config, config._attn_implementation) for config in _other_configs(layers, self._decoder.config)
        ]
        for config, _ in self._copies:
            config._attn_implementation = NAME
        for layer in self._layers:
            enter_layer(layer, settings, layers.index(layer))
        patch_head(model, settings)
        logger.info("hf_fpdt: %s", self)

    @property
    def store(self) -> CheckpointStore:
        """Where checkpoints, K and V lie, and what the steps so far take."""
        return self._settings.store

    def __str__(self) -> str:
        p = self.plugin
        chunk = self._auto_chunk() if p.chunk_tokens == "auto" else f"{p.chunk_tokens:,} tokens"
        return (
            f"{type(self.model).__name__}, {len(self._layers)} layers in chunks of {chunk}; kernel {p.kernel!r}; "
            f"checkpoints {p.checkpoints!r}; loss in chunks of "
            f"{self._settings.loss_chunk_tokens(self.model.config):,} tokens; {self._fused()}"
        )

    def _auto_chunk(self) -> str:
        """One number where it is known on what the model will run."""
        gpu, cpu = (
            f"{auto_chunk_tokens(self.plugin.sp_size, on_gpu=on_gpu):,} tokens on a {name}"
            for on_gpu, name in ((True, "GPU"), (False, "CPU"))
        )
        if not torch.cuda.is_available():
            return cpu
        return gpu if self.model.device.type == "cuda" else f"{gpu}, {cpu}"

    def _fused(self) -> str:
        if not self.plugin.fused:
            return "layers as the model has them"
        why_not = why_not_liger()
        experts = ", experts as one operation" if self._settings.fused_experts else ""
        return f"LoRA fused{experts}, {'Liger kernels' if why_not is None else f'no Liger kernels: {why_not}'}"

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
            check_entered(layer)
        for module in patched:
            unpatch(module)
        for layer in self._layers:
            leave_layer(layer)
        self._settings.store.close()
        if self._settings.host_weights is not None:
            self._settings.host_weights.close()
        if self._settings.progress is not None:
            self._settings.progress.close()
        self._decoder.set_attn_implementation(self._attention_before)
        for config, before in self._copies:
            config._attn_implementation = before
        self._layers, self._copies = [], []


def _other_configs(layers: list[nn.Module], own: Any) -> list[Any]:
    """The configurations that modules of the layers hold, other than the decoder's and parts of other models."""
    held = (getattr(module, "config", None) for layer in layers for module in layer.modules())
    return list({id(config): config for config in held if type(config) is type(own) and config is not own}.values())
