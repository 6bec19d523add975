"""Is a decoder layer what the executor takes it for? Each distinct one is tried on a few random tokens.

The executor gives a layer one chunk at a time. That is exact if everything in the layer but attention acts on each
token alone, or goes on from a state that the layer hands over. No list of names can say so: a hook, an adapter, a norm
over the batch may sit in any layer. So the layer itself is asked, see `trial_run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Chunk, ChunkPlan, Documents
from ..parallel import ChunkDocuments
from .calls import TrialCall, calling
from .gradients import GradientSums, mean_size
from .layer_run import along_tokens, tokens_of
from .layer_state import ByDocuments, LayerTraits, LinearsSeen, build_of
from .recurrent import StandInCache, kernels_of, plain_kernels, takes_marks
from .replay_state import Autocast, NoDropout, untouched_random_state
from .trial_run import (
    LEAST_TRIAL_TOKENS,
    NARROW_SUMS,
    SMALL,
    TRIAL_CHUNK_TOKENS,
    TRIAL_TOKENS,
    UNITS,
    LayerTrial,
    Outcome,
    token_errors,
    unit_of,
)
from .unread import ValuesSeen

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
    "install a pair that does (Triton 3.7.1 or newer with flash-linear-attention 0.6.0 or newer; mamba-ssm with "
    "causal-conv1d), or uninstall the package: PyTorch's path is exact, and much slower"
)
# What layers raise on tensors without memory: experts, most of all, which look at values. They come after attention,
# so what is looked for was seen by then.
_WITHOUT_VALUES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Tokens between documents of a trial: further than any scale of places that is known.
FAR = 2**20
logger = logging.getLogger(__name__)


@dataclass
class LayerTrials:
    """The trials of one model: layers that are built alike are tried once.

    Attributes:
        passed: what the layers were built like that passed, and what they were seen to do.
        by_documents: of those that were tried on documents, how they run on them.
    """

    passed: dict[tuple[object, ...], LayerTraits] = field(default_factory=dict)
    by_documents: dict[tuple[object, ...], ByDocuments] = field(default_factory=dict)

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
        if build in self.passed or hidden_BSD.shape[1] < 2:
            return None
        with _trial_of(layer, forward, hidden_BSD, arguments, window) as trial:
            reason = why_not_kernels(trial) if over_kernels(layer, hidden_BSD) else None
            reason = trial.why_not(cache) if reason is None else reason
        if reason is None:
            self.passed[build] = trial.traits
        return reason

    def with_documents(
        self,
        traits: LayerTraits,
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden_BSD: Tensor,
        arguments: Mapping[str, Any],
        window: int | None = None,
    ) -> LayerTraits:
        """What a layer that passed and asks for its cache does, on packed rows too; tried once, as in `check`."""
        build = build_of(layer)
        if build not in self.by_documents:
            with _trial_of(layer, forward, hidden_BSD, arguments, window) as trial:
                trial.traits = traits
                self.by_documents[build] = by_documents_of(trial)
        return replace(traits, by_documents=self.by_documents[build])

    def traits_of(self, layer: nn.Module, window: int | None) -> LayerTraits:
        """What a layer that passed was seen to do; the usual of one that was not tried."""
        return self.passed.get((window, *build_of(layer)), LayerTraits())


@contextmanager
def _trial_of(
    layer: nn.Module,
    forward: Callable[..., Any],
    hidden_BSD: Tensor,
    arguments: Mapping[str, Any],
    window: int | None,
) -> Iterator[LayerTrial]:
    """A trial on as many tokens as it takes; what it draws and casts is undone at its end."""
    tokens, device = min(hidden_BSD.shape[1], TRIAL_TOKENS), hidden_BSD.device
    with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device_of(hidden_BSD):
        first = first_tokens(arguments, hidden_BSD, tokens)
        times = repeats_of(tokens, over_kernels=over_kernels(layer, hidden_BSD))
        first, tokens = repeated(first, tokens, times), tokens * times
        trial = LayerTrial(layer, forward, first, hidden_BSD, tokens)
        # In a visit every window is in the mask; in a step those alone that are shorter than the sequence.
        trial.window, trial.keys = window, 2**62 if visiting() else hidden_BSD.shape[1]
        with untouched_random_state(device), Autocast.now(device).again(), trial.awake_adapters(), NoDropout():
            yield trial


def over_kernels(layer: nn.Module, hidden_BSD: Tensor) -> bool:
    """Whether packages' kernels may run in a layer."""
    return hidden_BSD.is_cuda and bool(kernels_of(layer))


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
    logger.info(
        "hf_fpdt: %s: comparing %s with PyTorch's path; a machine that runs them for the first time compiles and "
        "tunes kernels, for minutes",
        type(layer).__name__,
        names,
    )
    plain_sums, own_sums = GradientSums(trial.weights), GradientSums(trial.weights)
    with plain_kernels(layer):
        y_plain, dx_plain, _ = trial.step(x, dy, plain_sums)
    try:
        y, dx, _ = trial.step(x, dy, own_sums)
    except torch.OutOfMemoryError:
        raise
    # Without causal-conv1d mamba-ssm calls None; of heads that they do not serve packages raise what they like.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
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


def by_documents_of(trial: LayerTrial) -> ByDocuments:
    """How a layer that passed and asks for its cache may run on a chunk of several documents; it is tried on a few.

    What it gives must be what it gives for each document by itself. Kernels may ignore marks, or begin a document one
    token late; a layer may have a convolution of its own, which nothing was put around.
    """
    name = type(trial.layer).__name__
    ways: tuple[ByDocuments, ...] = ("marks", "scans") if takes_marks(trial.layer) else ("scans",)
    for way in ways if trial.traits.is_recurrent else ("places",):
        why = _why_not_by(way, trial)
        if why is None:
            logger.info("hf_fpdt: %s: packed rows run %s", name, HOW[way])
            return way
        logger.warning("hf_fpdt: %s: packed rows do not run %s: in its trial that %s", name, HOW[way], why)
    if trial.traits.is_recurrent:
        logger.warning("hf_fpdt: %s: packed rows run %s", name, HOW["layer"])
    return "layer"


HOW: Mapping[ByDocuments, str] = MappingProxyType(
    {
        "marks": "by marks of documents, which its kernels take",
        "scans": "with a call of its scans for each document, and all else of a chunk at once",
        "places": "with the number of tokens before in its document for each token",
        "layer": "with one document of a chunk after another, slowly where these are many and short",
    }
)


def _why_not_by(way: ByDocuments, trial: LayerTrial) -> str | None:
    trial.marked, beside = way == "marks", _beside_places if way == "places" else _beside_documents
    try:
        return "gave something else than one document at a time" if trial.why_never(lambda: beside(trial)) else None
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"failed: {error}"
    finally:
        trial.marked = False


def _beside_documents(trial: LayerTrial) -> tuple[str | None, Tensor]:
    """What chunks of a small packed row give beside each document by itself."""
    documents, x, dy = few_documents(trial.plan), trial.draw(), trial.draw()

    def cache_of(start: int, states: Mapping[str, Tensor], *, leaves: bool = False) -> StandInCache:
        tokens = range(start, min(start + trial.plan.chunk_tokens, documents.n_tokens))
        return StandInCache(start, states, leaves=leaves, part=ChunkDocuments(documents, tokens, tokens))

    return trial.beside(_alone(trial, documents, x, dy), trial.in_chunks(x, dy, cache_of))


def _beside_places(trial: LayerTrial) -> tuple[str | None, Tensor]:
    """The same of a layer that asks how many tokens came before; so many that the number may count."""
    documents, x, dy = few_documents(trial.plan), trial.draw(), trial.draw()
    starts, lengths = torch.tensor(documents.starts), torch.tensor(documents.lengths)
    before = (FAR * torch.arange(len(starts)) - starts).repeat_interleave(lengths).to(x.device)
    sums = GradientSums(trial.weights)
    y, dx, _ = trial.step(x, dy, sums, cache=StandInCache(before))
    return trial.beside(_alone(trial, documents, x, dy, FAR), (y, dx, sums.totals()))


def _alone(trial: LayerTrial, documents: Documents, x: Tensor, dy: Tensor, far: int = 0) -> Outcome:
    """Each document by itself, the next one `far` tokens further on."""
    parts, sums = list[tuple[Tensor, Tensor]](), GradientSums(trial.weights)
    for number, piece in enumerate(documents.pieces(range(documents.n_tokens))):
        tokens, part = slice(piece.start, piece.stop), Chunk(0, piece.start, piece.stop, piece.start, piece.stop)
        y, dx, _ = trial.step(x[:, tokens], dy[:, tokens], sums, part, StandInCache(number * far))
        parts.append((y, dx))
    y, dx = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return y, dx, sums.totals()


def few_documents(plan: ChunkPlan) -> Documents:
    """Of a trial's tokens: one of a single token, one that goes over a border of chunks, one on either side of it.

    Over kernels each is longer than the blocks of 64 that they are compiled for.
    """
    border, n_tokens = plan.chunk_tokens, plan.n_tokens
    starts = {0, max(1, border - border // 3), border + (n_tokens - border) // 2}
    starts |= {1} if n_tokens < KERNEL_TRIAL_TOKENS else set()
    return Documents(tuple(sorted(starts)), n_tokens)


def traits_without_memory(
    layer: nn.Module,
    forward: Callable[..., Any],
    hidden_BSD: Tensor,
    arguments: Mapping[str, Any],
    window: int | None,
    cache: str | None,
) -> LayerTraits:
    """What a layer whose weights have no memory does: attention with what it asks of it, states, linears.

    Args:
        layer: the layer.
        forward: its own, hidden states first.
        hidden_BSD: what it is given, on the meta device.
        arguments: its other arguments.
        window: the keys that a query sees, by the mask that the model makes for the layer.
        cache: what the layer calls its cache.

    Returns:
        What was seen until an error ended it; of a layer that did nothing by then what most do, attention alone.
    """
    stand_in, call, output = StandInCache(0), TrialCall(window), None
    watched = layer, hidden_BSD, lambda: call.calls > 0
    linears, values = LinearsSeen(*watched), ValuesSeen(*watched)
    hidden_BSD, caches = hidden_BSD.detach().requires_grad_(), {} if cache is None else {cache: stand_in}
    # A package's kernel would read what has no memory: on a GPU an illegal access, which ends the process later.
    with suppress(*_WITHOUT_VALUES), calling(call), linears.watched(), values.saved(), plain_kernels(layer):
        output = forward(hidden_BSD, **{**arguments, **caches})
    attends = call.calls > 0 or (output is None and not stand_in.finals)
    seen = LayerTraits.of(stand_in, cache, output, attends=attends, asked=call.asked)
    unread = frozenset[str]() if output is None else values.never_saved(attends=attends)
    return replace(seen, linears=linears.found(), unread=unread)


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
