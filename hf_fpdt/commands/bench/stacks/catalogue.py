"""FPDT as a stack, and every stack by name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ....config import AUTO_CHUNK_TOKENS_GPU, FPDTPlugin
from ....model import FPDTHandle, apply_fpdt
from ....training import FPDTAccelerator, sharding_collator
from ..predicted import predicted
from ..ranks import accelerator_of, trains_every_weight
from .alst import Alst
from .alst_ulysses import AlstSp
from .base import MANY_GPUS, Pieces, Stack, Unavailable
from .hugging_face import HuggingFace, Liger, OffloadedHuggingFace
from .ring import Ring


class Fpdt(Stack):
    """This package; settings beside the chunk are those of FPDT_* environment variables.

    Several GPUs share every sequence, as with `FPDTAccelerator(fpdt_plugin=FPDTPlugin(sp_size=...))`: adapters under
    DDP, every weight under FSDP2.
    """

    name = "fpdt"
    about = "this package, GPU memory used for what fits"

    gpus = (1, MANY_GPUS)
    packs = True
    settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    _handle: FPDTHandle
    _accelerator: Any

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """`apply_fpdt`, all processes a group whatever FPDT_SP_SIZE says."""
        logging.getLogger("hf_fpdt").setLevel(logging.INFO)
        chunk: int | Literal["auto"] = pieces.chunk_tokens or "auto"
        if pieces.most_tokens < AUTO_CHUNK_TOKENS_GPU:
            chunk = pieces.most_tokens // self.world.size * self.world.size
        self._plugin = FPDTPlugin(sp_size=self._sp_size(), chunk_tokens=chunk, **self.settings)
        group = None
        if self.world.size > 1:
            sharded = self._is_sharded(model)
            self._accelerator = accelerator_of(FPDTAccelerator, model, sharded=sharded, fpdt_plugin=self._plugin)
            group = self._accelerator.fpdt_group
        try:
            self._handle = apply_fpdt(model, self._plugin, group)
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error

    def _sp_size(self) -> int:
        return self.world.size

    def _is_sharded(self, model: nn.Module) -> bool:
        return trains_every_weight(model)

    def spread(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        if self.world.size == 1:
            return model, optimizer
        ready: tuple[nn.Module, Any] = self._accelerator.prepare(model, optimizer)
        return ready

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Each rank takes its part of the sequence, as its loader would give it."""
        if self.world.size == 1:
            return super().loss_and_backward(model, ids_BS, labels_BS)
        loss: Tensor = model(**self._own_part(ids_BS, labels_BS), use_cache=False).loss
        self._accelerator.backward(loss)
        return self.world.mean(loss)

    def _own_part(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Any]:
        group, on_gpu = self._accelerator.fpdt_group, ids_BS.is_cuda
        collator = sharding_collator(dict, self._plugin, group, on_gpu=on_gpu)
        part: dict[str, Any] = collator({"input_ids": ids_BS, "labels": labels_BS, **self.packed})
        return part

    def warm_up_tokens(self, pieces: Pieces) -> int:
        return 2 * (pieces.chunk_tokens or AUTO_CHUNK_TOKENS_GPU) + 1

    def predicted(self, model: nn.Module, n_tokens: int) -> dict[str, float]:
        if self.world.size > 1 and self._is_sharded(model):
            return {}
        gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        found = predicted(self._handle, model, n_tokens, gpu_name)
        return found | {"predicted_pinned_gib": found["predicted_pinned_gib"] * self.world.size}

    def pinned(self) -> tuple[int, float]:
        others, _ = super().pinned()
        store = self._handle.store
        return others + store.used_bytes().get("pinned", 0), store.pinning_seconds


class FpdtOnHost(Fpdt):
    """With as little GPU memory as it can."""

    name = "fpdt-host"
    about = "this package, K, V and checkpoints all in host memory"
    settings = MappingProxyType({"device_budget_gib": 0.0})


STACKS: MappingProxyType[str, type[Stack]] = MappingProxyType(
    {kind.name: kind for kind in (Fpdt, FpdtOnHost, HuggingFace, Liger, OffloadedHuggingFace, Alst, Ring, AlstSp)}
)


def stack_named(name: str) -> Stack:
    """A new stack of the catalogue, or one of your own as `module:Class`.

    Raises:
        Unavailable: there is none of that name.
    """
    if name in STACKS:
        return STACKS[name]()
    module, _, kind = name.partition(":")
    try:
        made: Stack = getattr(importlib.import_module(module), kind)()
    except (ImportError, AttributeError, ValueError) as error:
        raise Unavailable(
            f"--stacks {name}: one of {', '.join(STACKS)} or your own as module:Class was expected ({error})."
        ) from error
    return made
