"""The router's auxiliary loss of a mixture of experts, exact in chunks.

It is a product of two sums over all tokens of all layers: how many tokens chose each expert, and how much probability
each was given. Both are known at the end of the forward pass. So a layer hands them out beside its hidden states, and
in backward the gradient of its probabilities' sum goes into every chunk alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...numerics import accumulation_dtype
from ...parallel import SequenceParallelGroup, summed
from ...plan import by_layer

TURN_OFF = (
    "Set output_router_logits=False (TRL's trainers set it themselves: router_aux_loss_coef=0.0 in their config)."
)
ARGUMENT = "output_router_logits"
_LOSS, COEFFICIENT = "load_balancing_loss_func", "router_aux_loss_coef"


@dataclass(frozen=True)
class Router:
    """Which module's output is a router's logits.

    Attributes:
        module: of a layer.
        index: of its output, where that is a tuple.
    """

    module: nn.Module
    index: int


def routers_of(decoder: Any, layer: nn.Module) -> list[Router]:
    """By what the model tells transformers to record as `router_logits`."""
    specs = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
    found = []
    for spec in specs if isinstance(specs, list) else [specs]:
        kind = getattr(spec, "target_class", spec if isinstance(spec, type) else None)
        suffix, inside = getattr(spec, "class_name", None), getattr(spec, "layer_name", None)
        for name, module in layer.named_modules():
            own = (kind is not None and isinstance(module, kind)) or bool(suffix and name.endswith(suffix))
            if own and (inside is None or f".{inside.strip('.')}." in f".{name}."):
                found.append(Router(module, getattr(spec, "index", 1)))
    return found


@dataclass
class RouterSums:
    """Collects the sums of a model's layers in one forward pass.

    Attributes:
        top_k: experts that a token visits.
        weights_BS: how much each token counts; None: each 1.
        group: the ranks that share the sequence, each of which collects those of its own tokens.
        layers: of each layer that has run, probabilities and choices of each expert and tokens, [2 E + 1].
    """

    top_k: int
    weights_BS: Tensor | None = None
    group: SequenceParallelGroup = SequenceParallelGroup()
    layers: list[Tensor] = field(default_factory=list)

    def of(self, logits: list[Tensor], tokens: slice) -> Tensor | None:
        """The sums of a chunk, differentiable in the first E; None of a layer without a router.

        Args:
            logits: that its routers gave, [B · S, E] or [B, S, E].
            tokens: the chunk's, of each row.
        """
        parts = [self._sums(each.flatten(0, -2), tokens) for each in logits]
        return torch.stack(parts).sum(0) if parts else None

    def _sums(self, logits_TE: Tensor, tokens: slice) -> Tensor:
        shares = logits_TE.softmax(-1)  # in its own dtype, as transformers' is: so are the choices
        chosen = shares.detach().topk(self.top_k, dim=-1).indices
        wide = shares.to(accumulation_dtype(shares.dtype))
        weights = wide.new_ones(len(wide))
        if self.weights_BS is not None:
            weights = self.weights_BS[:, tokens].reshape(-1).to(wide)
        counts = wide.new_zeros(wide.shape[1])
        counts.scatter_add_(0, chosen.flatten(), weights.repeat_interleave(self.top_k))
        return torch.cat([weights @ wide, counts, weights.sum()[None]])

    def add(self, sums: Tensor | None) -> None:
        """Those of one layer's tokens, all together."""
        if sums is not None:
            self.layers.append(sums)

    def loss(self) -> Tensor:
        """Of all layers: E times the product of the mean share and the mean count of each expert, summed."""
        total = summed(self.group, torch.stack(self.layers).sum(0))
        experts = (len(total) - 1) // 2
        shares, counts, rows = total.split([experts, experts, 1])
        return experts * (shares / rows.detach() * (counts / rows).detach()).sum()


@dataclass(frozen=True)
class LayerSums:
    """One layer's part of the sums in one pass, as the engine asks for it.

    Attributes:
        sums: of the pass.
        routers: of the layer.
    """

    sums: RouterSums
    routers: list[Router]

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Inside, what the routers give is put into the list."""
        logits: list[Tensor] = []

        def take(index: int) -> Any:
            return lambda _, __, output: logits.append(output[index] if isinstance(output, tuple) else output)

        hooks = [router.module.register_forward_hook(take(router.index)) for router in self.routers]
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, given: list[Tensor], tokens: slice) -> Tensor | None:
        """The sums of a chunk."""
        return self.sums.of(given, tokens)


_collecting: ContextVar[tuple[RouterSums, Any] | None] = ContextVar("fpdt_router_sums", default=None)


def collected(layer: nn.Module) -> LayerSums | None:
    """A layer's part of the sums in the pass that is under way; None where none are wanted."""
    found = _collecting.get()
    return None if found is None else LayerSums(found[0], routers_of(found[1], layer))


def count_all_tokens() -> None:
    """The rows of the batch have become one, and their padding is left out of it."""
    if (found := _collecting.get()) is not None:
        found[0].weights_BS = None


@contextmanager
def collect(sums: RouterSums | None, decoder: Any) -> Iterator[None]:
    """Inside, layers of the decoder that run hand out their sums."""
    token = _collecting.set(None if sums is None else (sums, decoder))
    try:
        yield
    finally:
        _collecting.reset(token)


def wants_router_loss(config: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call, or else the configuration, asks for router logits."""
    if arguments.get(ARGUMENT) is not None:
        return bool(arguments[ARGUMENT])
    with suppress(ValueError):  # of several text models, which are refused
        return any(by_layer(config.get_text_config(), ARGUMENT))
    return False


def router_sums(
    model: Any, stack: tuple[Any, list[nn.Module]], arguments: dict[str, Any], padding_BS: Tensor | None
) -> RouterSums | None:
    """Where the pass's sums go, if a call wants the auxiliary loss; the call's arguments ask for it no more.

    Args:
        stack: the decoder and its layers.
        padding_BS: of a rank's own tokens, where ranks share the sequence; elsewhere the mask says it.

    Raises:
        NotImplementedError: it is not known.
    """
    wanted = wants_router_loss(model.config, arguments)
    if ARGUMENT in arguments or wanted:
        arguments[ARGUMENT] = False
    if not wanted:
        return None
    known = model._fpdt.found
    if COEFFICIENT not in known:
        known[COEFFICIENT] = why_no_router_loss(model, *stack)
    if why := known[COEFFICIENT]:
        raise NotImplementedError(f"hf_fpdt: the router's auxiliary loss is not served: {why}. {TURN_OFF}")
    group = model._fpdt.settings.group
    if group.size > 1:
        return RouterSums(model.num_experts_per_tok, None if padding_BS is None else ~padding_BS, group)
    mask = arguments.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise NotImplementedError(f"hf_fpdt: the router's auxiliary loss takes a 2-D mask or none. {TURN_OFF}")
    return RouterSums(model.num_experts_per_tok, mask)


def why_no_router_loss(model: Any, decoder: Any, layers: list[nn.Module]) -> str | None:
    """Why a model's auxiliary loss is not known to be the one computed here; None if it is.

    Its forward is looked at, and the function that it calls is tried on a few random logits.
    """
    forward = inspect.unwrap(type(model).forward)  # FSDP2 makes a class of its own of the model's, in its own module
    names, function = forward.__code__.co_names, forward.__globals__.get(_LOSS)
    if function is None or _LOSS not in names or COEFFICIENT not in names:
        return f"its forward makes no loss by {_LOSS} and {COEFFICIENT}"
    if not any(routers_of(decoder, layer) for layer in layers):
        return "it does not tell which of its modules give router logits"
    if not isinstance(getattr(model, "num_experts_per_tok", None), int):
        return "it does not tell how many experts a token visits (num_experts_per_tok)"
    return None if _is_known(function, model.num_experts_per_tok) else f"its {_LOSS} computes something else"


def _is_known(function: Any, top_k: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    experts = top_k + 3
    logits = tuple(torch.randn(10, experts, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    for weights in (None, mask):
        sums = RouterSums(top_k, weights)
        for each in logits:
            sums.add(sums.of([each], slice(None)))
        theirs = function(logits, experts, top_k, weights)
        if not isinstance(theirs, Tensor) or not torch.allclose(theirs, sums.loss(), rtol=1e-4):
            return False
    return True
