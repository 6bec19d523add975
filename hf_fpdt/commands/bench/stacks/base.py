"""TODO"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ranks import World


def package(name: str, advice: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported ({error}): {advice}.") from error


# More than one host has.
MANY_GPUS = 1024


class Unavailable(Exception):
    """A stack cannot run here; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Into what a stack cuts a sequence.

    Attributes:
        chunk_tokens: of FPDT; None: its own choice.
        most_tokens: at most so many in a piece of whatever it cuts. A short check cuts as a long run does.
    """

    chunk_tokens: int | None = None
    most_tokens: int = 2**31

    def tokens(self, usual: int) -> int:
        """Tokens of a piece that usually has so many."""
        return max(1, min(usual, self.most_tokens))


class Stack:
    """Hugging Face as it is; subclasses say what they change.

    Attributes:
        name: in tables and on the command line.
        about: what a user of it switches on.
        gpus: the fewest and the most that it trains one model on.
        world: the processes that do so; each has a GPU, and all are given the same sequences.
        packs: whether it takes rows of several documents.
        packed: what else the model is told of the next row: of one with several documents its `position_ids`.
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    gpus: ClassVar[tuple[int, int]] = (1, 1)
    world = World()
    packs: ClassVar[bool] = False
    packed: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def check_packs(cls, documents: str | None) -> None:
        """Whether it takes packed rows, where such are asked for.

        Raises:
            Unavailable: it does not.
        """
        if documents is not None and not cls.packs:
            raise Unavailable(
                f"--documents {documents}: the stack {cls.name or cls.__name__} is measured on one document a row; "
                "leave it out."
            )

    @classmethod
    def check_gpus(cls, count: int) -> None:
        """Whether it trains on so many.

        Raises:
            Unavailable: it does not.
        """
        least, most = cls.gpus
        if not least <= count <= most:
            several = f"at least {least}" if most > 1 else "one"
            raise Unavailable(f"--gpus {count}: the stack {cls.name or cls.__name__} is for {several}; leave it out.")

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """Change a new model in place.

        Args:
            model: a causal language model, or a PEFT model around one, in training mode.
            pieces: into what it may cut sequences.

        Raises:
            Unavailable: a package is missing, or the model is not for it.
        """

    def spread(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """The prepared model and its optimizer on all GPUs of `world`, as a user's training loop has them."""
        return model, optimizer

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The mean loss; gradients lie in the parameters then.

        Args:
            ids_BS, labels_BS: whole sequences, the same in all processes; labels not shifted.
        """
        loss = model(input_ids=ids_BS, labels=labels_BS, use_cache=False, **self.packed).loss
        loss.backward()
        return loss.detach()

    def warm_up_tokens(self, pieces: Pieces) -> int:
        """Length of a step after which every kernel is compiled."""
        return 4096

    def predicted(self, model: nn.Module, n_tokens: int) -> dict[str, float]:
        """Columns for what was predicted of a step of that length, which was run; nothing where nobody predicts."""
        return {}

    def pinned(self) -> tuple[int, float]:
        """Pinned host bytes at their highest, and the seconds so far in which nothing but pinning went on.

        What PyTorch's allocator pins in the middle of a step, it pins while the GPU works: that cannot be told apart.
        """
        if not torch.cuda.is_available():
            return 0, 0.0
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)), 0.0


def base_of(model: nn.Module) -> Any:
    """The transformers model, without PEFT's around it."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model
