"""FPDT as a stack, and every stack by name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..config import FPDTPlugin
from ..model import FPDTHandle, apply_fpdt
from ..patch import AUTO_CHUNK_TOKENS_GPU
from .peers import Alst, HuggingFace, Liger, OffloadedHuggingFace
from .predicted import predicted
from .stack import Pieces, Stack, Unavailable


class Fpdt(Stack):
    """This package; settings beside the chunk are those of FPDT_* environment variables."""

    name = "fpdt"
    about = "this package, GPU memory used for what fits"

    settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    _handle: FPDTHandle

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """`apply_fpdt`, one process whatever FPDT_SP_SIZE says."""
        logging.getLogger("hf_fpdt").setLevel(logging.INFO)
        chunk: int | Literal["auto"] = pieces.chunk_tokens or "auto"
        if pieces.most_tokens < AUTO_CHUNK_TOKENS_GPU:
            chunk = pieces.most_tokens
        try:
            self._handle = apply_fpdt(model, FPDTPlugin(sp_size=1, chunk_tokens=chunk, **self.settings))
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error

    def warm_up_tokens(self, pieces: Pieces) -> int:
        return 2 * (pieces.chunk_tokens or AUTO_CHUNK_TOKENS_GPU) + 1

    def predicted(self, model: nn.Module, n_tokens: int) -> dict[str, float]:
        gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return predicted(self._handle, model, n_tokens, gpu_name)

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
    {kind.name: kind for kind in (Fpdt, FpdtOnHost, HuggingFace, Liger, OffloadedHuggingFace, Alst)}
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
