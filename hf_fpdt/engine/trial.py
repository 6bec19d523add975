"""Is a decoder layer what the executor takes it for? Each distinct one is tried on a few random tokens.

The executor gives a layer one chunk at a time. That is exact if everything in the layer but attention acts on each
token alone, or goes on from a state that the layer hands over. No list of names can say so: a hook, an adapter, a norm
over the batch may sit in any layer. So the layer itself is asked, see `trial_run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Chunk, ChunkPlan
from .gradients import GradientSums
from .layer_run import tokens_of
from .layer_state import build_of
from .recurrent import LayerTraits, kernels_of, plain_kernels
from .replay_state import Autocast, untouched_random_state
from .trial_run import (
    LEAST_TRIAL_TOKENS,
    NARROW_SUMS,
    SMALL,
    TRIAL_CHUNK_TOKENS,
    TRIAL_TOKENS,
    UNITS,
    LayerTrial,
    NoDropout,
    along_tokens,
    mean_size,
    token_errors,
    unit_of,
)

_visiting: ContextVar[bool] = ContextVar("fpdt_visiting", default=False)


def visiting() -> bool:
    """Whether a pass is under way that tries layers on what they are given, and runs none."""
    return _visiting.get()


@contextmanager
def visit() -> Iterator[None]:
    """Inside, a layer is tried and gives back what it was given."""
    token = _visiting.set(True)
    try:
        yield
    finally:
        _visiting.reset(token)


# A recurrence's kernel is tuned and compiled for blocks of 64 tokens: on fewer it would be once more, for no use.
KERNEL_TRIAL_TOKENS = 384
INSTALL = (
    "install a pair that does (Triton 3.7.1 or newer with flash-linear-attention 0.6.0 or newer), or uninstall the "
    "package: PyTorch's path is exact, and much slower"
)
logger = logging.getLogger(__name__)


@dataclass
class LayerTrials:
    """The trials of one model: layers that are built alike are tried once.

    Attributes:
        passed: what the layers were built like that passed, and what they were seen to do.
    """

    passed: dict[tuple[object, ...], LayerTraits] = field(default_factory=dict)

    def check(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden_BSD: Tensor,
        arguments: Mapping[str, Any],
        window: int | None = None,
        cache: str | None = None,
    ) -> str | None:
        """Why the layer cannot be run in chunks; None if it can.

        Args:
            layer: a decoder layer, its weights whole.
            forward: its own forward, hidden states first.
            hidden_BSD: what it is given; only its kind is looked at.
            arguments: its other arguments for those tokens.
            window: the keys that a query sees, by the mask that the model makes for the layer.
            cache: the argument that the layer calls its cache.
        """
        build = (window, *build_of(layer))
        tokens = min(hidden_BSD.shape[1], TRIAL_TOKENS)
        if build in self.passed or tokens < 2:
            return None
        device, on_gpu = hidden_BSD.device, hidden_BSD.is_cuda
        with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device_of(hidden_BSD):
            first, over_kernels = first_tokens(arguments, hidden_BSD, tokens), on_gpu and bool(kernels_of(layer))
            times = repeats_of(tokens, over_kernels=over_kernels)
            first, tokens = repeated(first, tokens, times), tokens * times
            trial = LayerTrial(layer, forward, first, hidden_BSD, tokens)
            # In a visit every window is in the mask; in a step those alone that are shorter than the sequence.
            trial.window, trial.keys = window, 2**62 if visiting() else hidden_BSD.shape[1]
            with (
                untouched_random_state(device),
                Autocast.now(device).again(),
                trial.awake_adapters(),
                NoDropout(),
            ):
                reason = why_not_kernels(trial) if over_kernels else None
                reason = trial.why_not(cache) if reason is None else reason
        if reason is None:
            self.passed[build] = trial.traits
        return reason

    def traits_of(self, layer: nn.Module, window: int | None) -> LayerTraits:
        """What a layer that passed was seen to do; the usual of one that was not tried."""
        return self.passed.get((window, *build_of(layer)), LayerTraits())


def first_tokens(arguments: Mapping[str, Any], hidden_BSD: Tensor, kept: int) -> dict[str, Any]:
    """Arguments for the first tokens of the first row alone, as tensors that autograd may save."""
    rows, n_tokens = hidden_BSD.shape[:2]
    chunk, plan = Chunk(0, 0, kept, 0, kept), ChunkPlan(n_tokens, n_tokens)

    def first(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(first(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        return (value[:1] if value.dim() > 1 and value.shape[0] == rows else value).detach().clone()

    return {name: first(tokens_of(value, chunk, plan)) for name, value in arguments.items()}


def repeats_of(tokens: int, *, over_kernels: bool) -> int:
    """How often so many tokens are repeated, so that a trial of them all has a border between chunks."""
    return -(-(KERNEL_TRIAL_TOKENS if over_kernels else LEAST_TRIAL_TOKENS) // tokens)


def repeated(arguments: Mapping[str, Any], tokens: int, times: int) -> dict[str, Any]:
    """Arguments for so many times as many tokens."""
    return along_tokens(arguments, tokens, lambda value, axis: torch.cat([value] * times, axis))


def why_not_kernels(trial: LayerTrial) -> str | None:
    """Why what is installed for a layer's recurrence may not be used here; None if its gradients are PyTorch's.

    Kernels of the gated delta rule gave wrong gradients in silence on Hopper with some releases of Triton.
    """
    layer, x, dy = trial.layer, trial.draw(), trial.draw()
    names = ", ".join(kernels_of(layer))
    plain_sums, own_sums = GradientSums(trial.weights), GradientSums(trial.weights)
    with plain_kernels(layer):
        y_plain, dx_plain, _ = trial.step(x, dy, plain_sums)
    try:
        y, dx, _ = trial.step(x, dy, own_sums)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"{names} fails on this machine ({error}); {INSTALL}"
    plain, own = plain_sums.totals(), own_sums.totals()
    least = SMALL * max((mean_size(grad) for grad in plain.values()), default=0.0)
    weights = [(name, own.get(id(p)), plain[id(p)]) for name, p in layer.named_parameters() if id(p) in plain]
    for name, value, truth in [("its output", y, y_plain), ("the gradient of its input", dx, dx_plain), *weights]:
        size = max(mean_size(truth), 0.0 if truth is y_plain or truth is dx_plain else least)
        off = float("inf") if value is None else mean_size(value.float() - truth.float()) / max(size, 1e-30)
        if not off <= NARROW_SUMS:
            return (
                f"{names} computes something else on this machine than transformers does in PyTorch: {name} is off by "
                f"{off:.2g} of its size, and {NARROW_SUMS:g} is allowed; {INSTALL}"
            )
    logger.info("hf_fpdt: %s: gradients of %s are those of PyTorch's path", type(layer).__name__, names)
    return None


def mixes_tokens(function: Callable[[Tensor], Tensor], hidden_BSD: Tensor) -> bool:
    """Whether a function of hidden states gives some token something else in chunks than as a whole.

    Args:
        function: what is run by chunks beside layers: a norm, a head.
        hidden_BSD: what it is given; only its kind is looked at.
    """
    device = hidden_BSD.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, TRIAL_TOKENS, hidden_BSD.shape[-1], generator=generator, device=device).to(hidden_BSD.dtype)
    with torch.no_grad(), untouched_random_state(device), NoDropout():
        whole, parts = function(x), [function(part) for part in x.split(TRIAL_CHUNK_TOKENS, dim=1)]
    return bool((token_errors(torch.cat(parts, dim=1), whole) > UNITS * unit_of((), hidden_BSD)).any())
