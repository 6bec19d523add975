"""A decoder layer as the executor runs it: the class that is put in place of its own, and what it refuses.

A layer gets a subclass of its own class under the same name (accelerate finds layers by that name); its forward cuts
the sequence, and everything else stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..engine import (
    Layer,
    LayerRun,
    LayerTraits,
    cache_argument,
    look_of,
    run_layer,
    traits_without_memory,
    visiting,
)
from ..layout import Block, Documents
from ..parallel import documents_of_batch
from ..plan import LinearSize
from .attention_function import window_of_mask
from .fused import fuse_layer, linears_run_again, products_of_experts
from .patch import arguments_by_name, caches_in, signature_of
from .refusals import check_adapters
from .scoring.router import collected
from .settings import Settings
from .weights.whole import whole_weights


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head.

    Where a model names a base that it has not (the text model of Llama 4), it is the one model inside.
    """
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    headed = model.base_model is model and model.get_output_embeddings() is not None
    return inner[0] if headed and len(inner) == 1 else model.base_model


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder: what holds the stack of layers and the final norm."""
    decoder = model.get_decoder()
    return base_of(model) if decoder is model else decoder


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text decoder, in order; [] where there is no such stack."""
    decoder = decoder_of(model)
    for child in decoder.children() if decoder is not None else ():
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(isinstance(m, GradientCheckpointingLayer) for m in child)
        ):
            return list(child)
    return []


def check_stack(model: PreTrainedModel, settings: Settings) -> None:
    """Raise RuntimeError unless every layer of the decoder is one that `apply_fpdt` found at that place."""
    seen: set[int] = set()
    for index, layer in enumerate(decoder_layers(model)):
        known = _known_index(layer, settings)
        if known is None or (known != index and id(layer) not in seen):
            raise RuntimeError(
                f"hf_fpdt: layer {index} ({type(layer).__name__}) was put there after apply_fpdt, which knows nothing "
                "of it: call remove() on the handle, then change the model, then apply_fpdt again."
            )
        seen.add(id(layer))


def _known_index(layer: nn.Module, settings: Settings) -> int | None:
    """Where `apply_fpdt` found the layer; None of one that it did not find."""
    if not isinstance(layer, ChunkedLayer) or layer._fpdt_settings is not settings:
        return None
    return layer._fpdt_layer.index if layer._fpdt_layer.module is layer else None


def mostly_trained(parameters: list[nn.Parameter]) -> bool:
    """Whether weights train, not adapters alone."""
    return 2 * sum(p.numel() for p in parameters if p.requires_grad) > sum(p.numel() for p in parameters)


def layer_linears(layers: Sequence[Any], settings: Settings) -> tuple[tuple[LinearSize, ...], ...]:
    """Of each layer that was tried the linears that a backward pass computes again; () where there are none."""
    fused, visited = settings.plugin.fused, settings.sizes.experts if settings.fused_experts else 0
    found = []
    for layer in layers:
        traits, forward = layer._fpdt_traits, layer._fpdt_layer.raw_forward
        again = linears_run_again(layer, forward, traits, fused=fused)
        found.append((*again, *(products_of_experts(layer, forward, visited) if visited else ())))
    return tuple(found) if any(found) else ()


class ChunkedLayer(nn.Module):
    """Mixed into the class of each decoder layer; `_fpdt_*` are set by `enter_layer`."""

    _fpdt_settings: Settings
    _fpdt_layer: Layer
    _fpdt_class: Any
    _fpdt_window: int | None  # keys that a query sees, by the mask that the model made when layers were tried
    _fpdt_traits: LayerTraits  # what it was seen to do when it was tried
    _fpdt_looks: set[tuple[object, ...]]  # those that passed a trial
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
        raw = self._fpdt_layer.raw_forward
        arguments = arguments_by_name(signature_of(raw), self, *args, **kwargs)
        name = next(iter(arguments))
        hidden = arguments.pop(name)
        if visiting():
            arguments |= _no_caches(arguments)
        elif _needs_whole_sequence(self, arguments):
            return self._fpdt_whole(hidden, arguments)
        if (window := window_of_mask(arguments.get("attention_mask"))) is not None:
            arguments["attention_mask"] = None
            # On ranks the mask does not say which kind of window it is for.
            window = Block(window) if isinstance(self._fpdt_window, Block) else window
        _check_arguments(arguments, hidden, self._fpdt_layer.name)
        with self._fpdt_settings.store.one_thread.entered(self._fpdt_layer.name):
            self._fpdt_try(hidden, arguments, window)
            if visiting():
                self._fpdt_window = window
                return self._fpdt_traits.returned(hidden)
            return self._fpdt_traits.returned(self._fpdt_in_chunks(hidden, arguments, window))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to()` does; weights that wait on the host stay there."""
        host = self._fpdt_settings.host_weights
        with nullcontext() if host is None else host.left_alone(self, fn):
            return super()._apply(fn, recurse)

    def _fpdt_whole(self, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """The layer's own forward; of a single token, to be generated, over quantised weights as they are."""
        layer, decodes = self._fpdt_layer, hidden.is_cuda and hidden.shape[1] == 1
        decodes = decodes and self._fpdt_settings.host_weights is None
        with nullcontext() if decodes else layer.weights(hidden.dtype, hidden.device, layer.index + 1):
            if (aside := collected(self)) is None:
                return layer.forward(hidden, **arguments)
            with aside.noted() as given:
                output = layer.forward(hidden, **arguments)
        aside.sums.add(aside.of(given, slice(None)))
        return output

    def _fpdt_in_chunks(self, hidden: Tensor, arguments: dict[str, Any], window: int | None) -> Tensor:
        settings, parameters = self._fpdt_settings, list(self.parameters())
        fuse_layer(self, self._fpdt_layer.raw_forward, settings, self._fpdt_layer.index, self._fpdt_traits.unread)
        # What the pass keeps where is settled before its first layer is entered; see `CheckpointStore.pass_of`.
        store, placed = settings.store, (hidden.device, self._fpdt_layer.is_sharded)
        documents = documents_of_batch()
        _check_documents(self._fpdt_traits, documents, self._fpdt_layer)
        step = replace(settings.step(hidden, is_sharded=self._fpdt_layer.is_sharded), documents=documents)
        _check_window(window, step.windows[self._fpdt_layer.index], self._fpdt_layer.name)
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *parameters))
        if (host := settings.host_weights) is not None:
            host.check_adapters(self, hidden.device)
            if wants_grad:
                host.check_frozen(self)
        model_pass = store.pass_of(self._fpdt_layer.index, step, *placed) if wants_grad else None
        run = LayerRun(
            self._fpdt_layer,
            arguments,
            step,
            store.kv_plan(step, *placed) if model_pass is None else model_pass.plan.kv,
            model_pass,
            window,
            self._fpdt_traits,
            full=settings.progress is not None and mostly_trained(parameters),
            aside=(aside := collected(self)),
        )
        output, sums = run_layer(run, hidden, parameters)
        if aside is not None:
            aside.sums.add(sums)
        return output

    def _fpdt_try(self, hidden: Tensor, arguments: dict[str, Any], window: int | None) -> None:
        """Try the layer on a few tokens, the first time that it looks as it does now.

        Raises:
            NotImplementedError: it cannot be run in chunks.
        """
        if hidden.is_meta:
            forward, cache = self._fpdt_layer.forward, cache_argument(self._fpdt_layer.raw_forward)
            self._fpdt_traits = traits_without_memory(self, forward, hidden, arguments, window, cache)
            return
        look, trials, given = look_of(self), self._fpdt_settings.trials, (hidden, arguments, window)
        if look not in self._fpdt_looks:
            check_adapters(self, self._fpdt_layer.name)
            if hidden.shape[1] < 2:
                return  # nothing to cut: a longer sequence tries it
            cache = cache_argument(self._fpdt_layer.raw_forward)
            with self._fpdt_layer.weights(hidden.dtype, hidden.device):
                reason = trials.check(self, self._fpdt_layer.forward, *given, cache)
                found = trials.traits_of(self, window)
            if reason is not None:
                raise NotImplementedError(f"hf_fpdt: {self._fpdt_layer.name} cannot be run in chunks: {reason}.")
            self._fpdt_looks.add(look)
            self._fpdt_traits = found
        traits = self._fpdt_traits
        # Kernels are compiled once more for marks: where rows are packed. With attention in it a layer may refuse
        # them, so a batch of padded rows must know before.
        untried = traits.cache is not None and traits.by_documents is None
        if untried and (traits.attends or documents_of_batch() is not None):
            with self._fpdt_layer.weights(hidden.dtype, hidden.device):
                self._fpdt_traits = trials.with_documents(traits, self, self._fpdt_layer.forward, *given)


def takes_documents(layer: Any) -> bool:
    """Whether a layer that was entered runs on rows of several documents as fast as on one."""
    if not isinstance(layer, ChunkedLayer):
        return False
    traits = layer._fpdt_traits
    return traits.cache is None or traits.by_documents != "layer"  # or is tried when they come


def enter_layer(layer: Any, settings: Settings, index: int) -> None:
    """Put `ChunkedLayer` into the layer's class, and describe the layer to the engine."""
    original: Any = type(layer)
    checkpointing = layer.__dict__.pop("gradient_checkpointing", None)
    layer.__class__ = _chunked_class(original)
    layer._fpdt_settings, layer._fpdt_looks = settings, set()
    layer._fpdt_window, layer._fpdt_traits = None, LayerTraits()
    layer._fpdt_layer = Layer(
        name=f"layer {index} ({original.__name__})",
        index=index,
        module=layer,
        raw_forward=raw_forward_of(original),
        kernel=settings.plugin.kernel,
        store=settings.store,
        group=settings.group,
        progress=settings.progress,
        whole=functools.partial(whole_weights, layer, settings),
    )
    layer._fpdt_class, layer._fpdt_checkpointing = original, checkpointing


def check_entered(layer: Any) -> None:
    if type(layer) is not _chunked_class(layer._fpdt_class):
        raise RuntimeError(
            f"hf_fpdt: {layer._fpdt_layer.name} was wrapped after apply_fpdt (FSDP2?); it cannot be restored now."
        )


def leave_layer(layer: Any) -> None:
    original, checkpointing = layer._fpdt_class, layer._fpdt_checkpointing
    for name in [name for name in layer.__dict__ if name.startswith("_fpdt_")]:
        delattr(layer, name)
    layer.__class__ = original
    if checkpointing is not None:
        layer.gradient_checkpointing = checkpointing


@functools.lru_cache
def _chunked_class(original: Any) -> type[nn.Module]:
    return type(original.__name__, (ChunkedLayer, original), {"__module__": original.__module__})


@functools.lru_cache
def raw_forward_of(layer_class: Any) -> Callable[..., Any]:
    """The layer's forward without the checkpointing wrapper that newer transformers put around it."""
    forward = layer_class.forward
    wrapped = forward.__code__.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if wrapped else forward


def _needs_whole_sequence(layer: ChunkedLayer, arguments: dict[str, Any]) -> bool:
    """Generation with a cache, or evaluation under a mask: the layer runs as it is, over the bare attention function.

    In training an empty cache is dropped, as transformers' own checkpointing does. Without gradients nothing is
    trained, whatever mode the layer is in: samples may be generated between two steps.
    """
    for name in caches_in(arguments):
        if not (layer.training and torch.is_grad_enabled()):
            return True
        if _has_past(arguments[name]):
            raise NotImplementedError(
                "hf_fpdt: training behind a filled cache (prefix tuning?) is not supported; use LoRA or full "
                "fine-tuning."
            )
    arguments |= _no_caches(arguments)
    mask = arguments.get("attention_mask")
    by_token = mask is not None and mask.dim() == 2 and not layer._fpdt_traits.attends  # cut as hidden states are
    return not (mask is None or by_token or torch.is_grad_enabled()) and window_of_mask(mask) is None


def _has_past(cache: Any) -> bool:
    """Whether there are keys or states of earlier tokens in a cache; of layers without either it cannot be asked."""
    with suppress(ValueError):
        if cache.get_seq_length() > 0:
            return True
    with suppress(ValueError, AttributeError):
        return bool(cache.has_previous_state())
    return False


def _no_caches(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the arguments that are caches are to be instead."""
    names = caches_in(arguments)
    return {**dict.fromkeys(names), "use_cache": False} if names else {}


def _check_arguments(arguments: dict[str, Any], hidden: Tensor, name: str) -> None:
    """Refuse what a chunk cannot be given a part of: masks, and tensors whose token axis is not where it should be."""
    if hidden.dim() != 3:
        raise NotImplementedError(
            f"hf_fpdt: {name} got hidden states of shape {tuple(hidden.shape)}; [batch, tokens, width] is expected."
        )
    n_tokens = hidden.shape[1]
    for key, value in arguments.items():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            why = _why_not_sliced(key, tensor, n_tokens) if isinstance(tensor, Tensor) else None
            if why is not None:
                raise NotImplementedError(f"hf_fpdt: {name} got {key!r} of shape {tuple(tensor.shape)}: {why}")


def _check_documents(traits: LayerTraits, documents: Documents | None, layer: Layer) -> None:
    """Refuse packed rows where a layer is given something that is one for a chunk, and not one for each document."""
    one_by_one = bool(traits.states) and not traits.attends and layer.group.size == 1
    if documents is None or traits.cache is None or traits.by_documents not in (None, "layer") or one_by_one:
        return
    why = "asks how many tokens came before it, and does not take a number for each token"
    if traits.states:
        who = "its attention cannot" if traits.attends else f"{layer.group.size} ranks cannot share"
        why = (
            "has scans or convolutions that cannot be stopped where a document begins, so it would have to run on one "
            f"document after another, which {who}"
        )
    raise NotImplementedError(
        f"hf_fpdt: {layer.name} does not take a packed row of {len(documents.starts)} documents: it {why}; give one "
        "document a row, and rows of one length."
    )


def _check_window(asked: int | None, planned: int | None, name: str) -> None:
    """Refuse a window that no memory was planned for."""
    if asked != planned:
        raise NotImplementedError(
            f"hf_fpdt: the mask that {name} got is for a window of {asked or 'no'} keys, and memory was planned for "
            f"one of {planned or 'no'} keys, as the model's masks or its configuration said when FPDT was applied. "
            "Apply it again after such a change."
        )


def _why_not_sliced(key: str, value: Tensor, n_tokens: int) -> str | None:
    if key == "attention_mask" and value.dim() > 2:
        return "masks are not supported in training; pad on the right with label -100 and pass no 4-D mask."
    if value.requires_grad:
        return "only hidden states may carry a gradient into a layer."
    elsewhere = [axis for axis, size in enumerate(value.shape) if size == n_tokens > 1 and axis != 1]
    if value.dim() > 1 and elsewhere and value.shape[1] != n_tokens:
        return f"its token axis is {elsewhere[0]}, but only axis 1 is cut in chunks."
    return None
