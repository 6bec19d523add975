"""Replacing the `forward` of one module instance, and taking the replacement away again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from .settings import Settings


@dataclass
class Patch:
    """Left on a patched module as `_fpdt`: what its new forward needs, and what was there before.

    Attributes:
        values: by layer, for layers may share a module, what becomes of its output (`fused_linear.OutputUse`), where
            that is known now.
        entries: of a linear, by layer, the name under which its output may be kept for the backward pass.
        found: what its new forward found out, by what that depends on.
    """

    settings: Settings
    forward: Callable[..., Any]
    signature: inspect.Signature
    instance_forward: Callable[..., Any] | None
    values: dict[int, Any] = field(default_factory=dict)
    entries: dict[int, str | None] = field(default_factory=dict)
    found: dict[Any, Any] = field(default_factory=dict)


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
            f"hf_fpdt: {type(module).__name__}.forward was replaced after apply_fpdt (by accelerate, Liger, …); undo "
            "that first, for accelerate by accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
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


# Asked for in every layer of every generated token; a class's forward does not change.
signature_of = functools.lru_cache(inspect.signature)


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
