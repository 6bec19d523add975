"""The model's own forward, run for the sake of its head: on the hidden states of some tokens, by its own code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...engine import Head, RandomState, is_fsdps
from ...labels import IGNORE_INDEX, check_padding, shifted
from ...parallel import PADDING_KEY, SAMPLE_KEY, Packing, without_ends
from ..layers import base_of, decoder_layers, decoder_of, takes_documents
from .router import collect, router_sums

WHY_NOT_WHOLE = "the forward of {} does not run its base model as a whole; train it without apply_fpdt"


@dataclass
class HeadCall:
    """Set while the model's own forward runs for the sake of its head.

    Without `outputs` the base model runs and leaves its outputs here; with them, the base model stands aside and the
    head sees them.

    Attributes:
        packing: how the base model ran on the batch; its hidden states are still so, but for `whole`.
        whole: whether the head sees all that the base model gave at once; else one token of it.
        began: the random state in which the head began.
    """

    outputs: Any = None
    packing: Packing = Packing()
    whole: bool = False
    began: RandomState | None = None


_head_call: ContextVar[HeadCall | None] = ContextVar("fpdt_head_call", default=None)


def current_head_call() -> HeadCall | None:
    """The one under way."""
    return _head_call.get()


@contextmanager
def as_head_call(call: HeadCall) -> Iterator[HeadCall]:
    token = _head_call.set(call)
    try:
        yield call
    finally:
        _head_call.reset(token)


@dataclass(frozen=True)
class Told:
    """What `ShardingCollator` says of a batch beside its tokens, which the model's own forward does not know.

    Attributes:
        sample: a number of each whole row.
        padding: which of this rank's tokens are padding, [B, S/P]; None: none.
    """

    sample: Tensor | None = None
    padding: Tensor | None = None


_told: ContextVar[Told | None] = ContextVar("fpdt_told", default=None)


def told_of_batch() -> Told:
    """What is said of the batch that the model is called with."""
    return _told.get() or Told()


@contextmanager
def told_by(arguments: dict[str, Any]) -> Iterator[None]:
    """Inside, what was said in these arguments of a whole model, and is taken out of them."""
    token = _told.set(Told(arguments.pop(SAMPLE_KEY, None), arguments.pop(PADDING_KEY, None)))
    try:
        yield
    finally:
        _told.reset(token)


def with_fields(outputs: Any, **fields: Any) -> Any:
    """A copy of a model's output with other `fields`; assigning to one would leave its entry as a mapping behind."""
    return type(outputs)(**{**outputs, **fields})


@dataclass(frozen=True)
class Ran:
    """What a model's forward gave when its base model ran once.

    Attributes:
        outputs: what it returned, of one token.
        hidden_BSD: hidden states, as the batch was packed.
        packing: how that was.
        logits_of: hidden [B, S, D] to logits [B, S, V], by the same forward.
        router_loss: the auxiliary loss of its routers, where it was asked for.
    """

    outputs: Any
    hidden_BSD: Tensor
    packing: Packing
    logits_of: Callable[..., Tensor]
    router_loss: Tensor | None


def head_after(model: Any, arguments: dict[str, Any]) -> Ran:
    """Run the model's own forward, its base model once and its head on one token.

    Args:
        arguments: of the forward, without labels.
    """
    padding = told_of_batch().padding
    sums = router_sums(model, (decoder_of(model), decoder_layers(model)), arguments, padding)
    with collect(sums, decoder_of(model)), as_head_call(HeadCall()) as call:
        outputs = model._fpdt.forward(**arguments)
    if call.outputs is None:
        raise NotImplementedError(f"hf_fpdt: {WHY_NOT_WHOLE.format(type(model).__name__)}.")
    shell = with_fields(call.outputs, last_hidden_state=None)  # holds no hidden states

    def logits_of(hidden: Tensor, **kept: int | Tensor) -> Tensor:
        """Logits of hidden states [B, S, D] by the model's own forward."""
        with (
            as_head_call(HeadCall(with_fields(shell, last_hidden_state=hidden))),
            without_fsdp(heads_of(model)),
        ):
            logits: Tensor = model._fpdt.forward(**arguments, **kept).logits
        return logits

    return Ran(outputs, call.outputs[0], call.packing, logits_of, None if sums is None else sums.loss())


def described_head(model: Any, logits_of: Callable[..., Tensor], ignore_index: int = IGNORE_INDEX) -> Head:
    """The head as the engine takes it.

    Raises:
        NotImplementedError: FSDP2 took its weights away again.
    """
    heads = heads_of(model)
    if any(hasattr(p, "placements") for child in heads for p in child.parameters()):
        # FSDP2 put them back as shards after the pass above; what computes the logits would be other tensors.
        raise NotImplementedError(
            "hf_fpdt: FSDP2 reshards the head as soon as it has run; wrap it with reshard_after_forward=False, or "
            "leave it in the root's unit."
        )
    return Head(
        logits_of=logits_of,
        parameters=list({id(p): p for child in heads for p in child.parameters()}.values()),
        chunk_tokens=model._fpdt.settings.loss_chunk_tokens(model.config),
        ignore_index=ignore_index,
    )


def may_join(base: Any) -> bool:
    """Whether rows may become one of a text's tokens, whose positions are an argument of this patched base model."""
    positions = "position_ids" in base._fpdt.signature.parameters
    text = base.config is base.config.get_text_config()
    # NEFTune's noise goes by the tokens of a row as it is given, padding too.
    noisy = hasattr(base.get_input_embeddings(), "neftune_noise_alpha")
    return positions and text and not noisy and all(map(takes_documents, decoder_layers(base)))


def heads_of(model: Any) -> list[nn.Module]:
    """What the model's forward may run after its base model."""
    base = base_of(model)
    return [child for child in model.children() if child is not base]


@contextmanager
def without_fsdp(modules: list[nn.Module]) -> Iterator[None]:
    """FSDP2's hooks saw the head's one whole pass; on every chunk they would end their unit's backward pass early."""
    inner = [module for outer in modules for module in outer.modules()]
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in inner]
    for module in inner:
        module._forward_pre_hooks = _not_fsdps(module._forward_pre_hooks)
        module._forward_hooks = _not_fsdps(module._forward_hooks)
    try:
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


def _not_fsdps(hooks: Any) -> Any:
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_fsdps(hook))


def targets_of(packing: Packing, ignore_index: int, mask: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    """The next token of each position that the hidden states are of; none at the end of a document.

    Whether a row's last token has a label is the caller's to say, as in transformers, though another row follows now.
    """
    labels, shift_labels = given["labels"], given["shift_labels"]
    targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
    if mask is not None and mask.shape == targets.shape:
        mask = mask.to(targets.device)
        # On the left there may be some: it is masked.
        check_padding("hf_fpdt", (mask == 0) & (mask.cumsum(1) > 0), targets, ignore_index)
    if packing.rows is not None:
        targets = packing.rows.flat(targets)
    documents = packing.documents if packing.rows is None else packing.rows.marked
    if documents is None or targets.shape != (1, documents.n_tokens):
        return targets  # a rank's part of a row has no end that the collator has not seen
    return without_ends(targets, documents, ignore_index)
