"""`model(..., labels=..., fused_lm_head=True)`, TRL's call, and `chunked_log_probs`, ours: answered by chunks.

TRL (1.15 and later) puts a forward of its own on the model, which gathers hidden states of tokens with a label and
makes log-probabilities of them. What it was told (temperature, what to compute) is in its closure; the answer is of
its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...engine import STATISTICS, LastUse
from ...engine import chunked_log_probs as log_probs_by_chunks
from ...labels import IGNORE_INDEX, shifted
from ...parallel import marks_of
from ..layers import ChunkedLayer, base_of
from ..patch import arguments_by_name, caches_in
from ..refusals import check_loss_arguments
from .head_call import described_head, head_after, heads_of, may_join, targets_of, told_by, told_of_batch
from .left_padding import move_rows, padded_left, why_not_relative
from .router import COEFFICIENT
from .whole_rows import cut_rows

# TRL's argument, and ours.
TRLS, OURS = "fused_lm_head", "fpdt_log_probs"
_TRLS_SETTINGS = ("temperature", "outputs", "cast_lm_head_to_fp32")


@dataclass
class TokenLogProbs(ModelOutput):
    """What `chunked_log_probs` returns.

    Tensors about tokens are [B, S - 1], or [B, S] with `shift_labels`: of the next token of each position, 0 where its
    label is -100. They are in fp32 (float64 for float64 logits). Those that were not asked for are None.

    Attributes:
        loss: -log_probs, summed, over the number of labels (or `num_items_in_batch`).
        log_probs: of the labels under softmax(logits / temperature).
        entropy: of the distribution, in nats; differentiable, as log_probs are.
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits: over the vocabulary, of logits / temperature.
        is_top1: whether the label is the likeliest token.
        label_mask: whether there is a label.
        aux_loss: of the routers of a mixture of experts, where `output_router_logits` asks for it; it is in `loss`,
            times the configuration's `router_aux_loss_coef`.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What a call wants to know of its tokens.

    Attributes:
        asked: of `STATISTICS`, beside log-probabilities.
        in_fp32: whether the head computes in fp32, outside of autocast.
        answer: class of the answer, with the fields of `TokenLogProbs`.
    """

    temperature: float = 1.0
    asked: tuple[str, ...] = ()
    in_fp32: bool = False
    answer: Any = TokenLogProbs


def chunked_log_probs(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    outputs: Collection[str] = (),
    head_in_fp32: bool = False,
    **inputs: Any,
) -> TokenLogProbs:
    """Log-probabilities of labels, differentiable, without whole logits: for losses of your own.

    Logits exist for `loss_chunk_tokens` tokens at a time, of tokens with a label alone. Softcaps, scales and biases
    are those of the model's own head.

    Where ranks share sequences, each of a group gives the same whole rows and gets all that is found. Each then makes
    the same loss of it, and gradients are averaged over all ranks, as DDP and FSDP2 do.

    Args:
        model: with FPDT applied, wrapped by PEFT or DDP or not.
        temperature: what logits are divided by.
        outputs: what else is computed: "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        head_in_fp32: whether the head computes in fp32, whatever its weights and autocast are.
        inputs: of the model: input_ids, attention_mask and `labels` [B, S], -100 where nothing is asked, each about
            the token at its own position; or `shift_labels` [B, S] about the next one. `num_items_in_batch`: what
            `loss` is divided by.

    Raises:
        ValueError: FPDT is not applied, there are no labels, a temperature that is not positive, or an unknown output;
            ranks of a group have other rows, or a part of them.
        NotImplementedError: with sp_size above 1, something in the inputs cannot be cut over ranks.
    """
    if not temperature > 0:
        raise ValueError(f"hf_fpdt: chunked_log_probs(temperature={temperature!r}): give a number above 0.")
    if unknown := set(outputs) - {"log_probs", *STATISTICS}:
        raise ValueError(
            f"hf_fpdt: chunked_log_probs(outputs={sorted(unknown)}): there are {', '.join(STATISTICS)}; log_probs "
            "are always there."
        )
    if not any(isinstance(module, ChunkedLayer) for module in model.modules()):
        raise ValueError("hf_fpdt: chunked_log_probs: this model has no FPDT; call apply_fpdt(model) first.")
    asked = tuple(name for name in STATISTICS if name in outputs)
    found: TokenLogProbs = model(**inputs, **{OURS: Request(temperature, asked, head_in_fp32)})
    return found


def taken_request(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Request | None:
    """What is asked by `kwargs`, taken out of them; None if it is nothing, or asked in a way that is TRL's own affair.

    Args:
        forward: the model's, before it was patched.
    """
    if OURS in kwargs:
        request: Request = kwargs.pop(OURS)
        return request
    request_ = trls_request(forward) if kwargs.get(TRLS) else None
    if request_ is not None:
        del kwargs[TRLS]
    return request_


def trls_request(forward: Any) -> Request | None:
    """What TRL asks by a forward of its own; None where there is none, or it is of another release.

    By the settings in the closure of the forward that TRL put on the model; accelerate's may be around it.
    """
    function = getattr(forward, "__func__", None)
    while function is not None and not str(getattr(function, "__globals__", {}).get("__name__")).startswith("trl."):
        function = getattr(function, "__wrapped__", None)
    if not inspect.isfunction(function):
        return None
    told = inspect.getclosurevars(function).nonlocals
    answer = function.__globals__.get("FusedCausalLMOutput")
    if answer is None or any(name not in told for name in _TRLS_SETTINGS):
        return None
    temperature, outputs, in_fp32 = (told[name] for name in _TRLS_SETTINGS)
    if set(outputs) - {"log_probs", *STATISTICS}:
        return None
    return Request(temperature, tuple(name for name in STATISTICS if name in outputs), in_fp32, answer)


def asks_for_log_probs(model: Any) -> bool:
    """Whether TRL's `fused_lm_head` is on a model, that may be wrapped by PEFT, and what it asks is known."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return trls_request(getattr(inner, "forward", None)) is not None


def answer(model: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
    """Run the base model by chunks, then its head on tokens with a label, by chunks."""
    arguments = arguments_by_name(model._fpdt.signature, *args, **kwargs)
    labels, shift_labels, num_items = (
        arguments.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")
    )
    check_loss_arguments(arguments)
    if labels is None and shift_labels is None:
        raise ValueError("hf_fpdt: log-probabilities are of labels: pass labels, or shift_labels.")
    arguments["return_dict"] = True
    if not caches_in(arguments):
        arguments["use_cache"] = False
    targets = shifted(labels) if shift_labels is None else shift_labels
    moved = padded_left(arguments.get("attention_mask"))
    if moved is not None and why_not_relative(model) is None:
        targets = move_rows(moved, arguments, targets)
    else:
        moved = None  # a mask, where nothing is trained; where something is, the base model refuses it
    settings = model._fpdt.settings
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        settings.awaited = settings.awaited or settings.between
    if settings.group.size == 1:
        in_batch, router_loss = _scored(model, request, arguments, targets)
    else:
        in_batch, router_loss = _scored_by_ranks(model, request, arguments, targets)
    in_batch = in_batch if moved is None else {name: moved.back(value) for name, value in in_batch.items()}
    answered = _answered(request, in_batch, num_items, own=shift_labels is not None)
    if router_loss is not None:
        answered.aux_loss = router_loss
        answered.loss = answered.loss + getattr(model.config.get_text_config(), COEFFICIENT, 0.0) * router_loss
    return answered


Found = tuple[dict[str, Tensor], Tensor | None]


def _scored(model: Any, request: Request, arguments: dict[str, Any], targets: Tensor) -> Found:
    """What is asked of each token, by name, as the rows were given; and the routers' loss."""
    ran = head_after(model, arguments)
    mask, given = arguments.get("attention_mask"), {"labels": None, "shift_labels": targets}
    targets = targets_of(ran.packing, IGNORE_INDEX, mask, given)
    head = described_head(model, _in_fp32(model, ran.logits_of) if request.in_fp32 else ran.logits_of)
    found = log_probs_by_chunks(
        head,
        ran.hidden_BSD,
        targets,
        temperature=request.temperature,
        asked=request.asked,
        last_use=model._fpdt.found.setdefault(OURS, LastUse()),
        modules=heads_of(model),
    )
    rows = {name: getattr(found, name) for name in ("log_probs", "label_mask", *request.asked)}
    if (packed := ran.packing.rows) is not None:
        rows = {name: packed.padded(value) for name, value in rows.items()}
    return rows, ran.router_loss


def _scored_by_ranks(model: Any, request: Request, arguments: dict[str, Any], targets: Tensor) -> Found:
    """The same where ranks share sequences: each is given whole rows, scores its part, and gets what all found."""
    settings = model._fpdt.settings
    if told_of_batch().sample is not None:
        raise ValueError(
            "hf_fpdt: with sp_size above 1 log-probabilities are of whole rows, which the model cuts, and this batch "
            "was cut by a ShardingCollator: give every rank of a group the same rows as they are."
        )
    cut, own, own_targets = cut_rows(settings, arguments, targets, may_join=may_join(base_of(model)))
    with told_by(own), marks_of(own):
        rows, router_loss = _scored(model, request, own, own_targets)
    if settings.packed is not None:
        settings.packed = (tuple(targets.shape), settings.packed[1])
    return cut.whole(rows), router_loss


def _answered(request: Request, whole: dict[str, Tensor], num_items: Any, *, own: bool) -> Any:
    """In the shape of the call: one token less than the row where labels were shifted here."""
    fields = {name: value[:, : None if own else -1] for name, value in whole.items()}
    items = fields["label_mask"].sum().clamp(min=1) if num_items is None else num_items
    return request.answer(loss=-fields["log_probs"].sum() / items, **fields)


def _in_fp32(model: Any, logits_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wide_logits_of(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False), _wide(model.get_output_embeddings()):
            return logits_of(hidden.float())

    return wide_logits_of


@contextmanager
def _wide(head: Any) -> Iterator[None]:
    """Inside, the head's weights are cast to fp32 as they are used, outside of autocast."""
    own = vars(head).get("forward")  # TRL has put its own there, which casts
    if own is None and type(head) is not nn.Linear:
        raise NotImplementedError(
            f"hf_fpdt: the head ({type(head).__name__}) is no plain Linear, which could be cast to fp32: leave it "
            "in its own dtype (cast_lm_head_to_fp32=False), or load the model in fp32."
        )

    def forward(x: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):  # what is around the model's forward may have it on
            if own is not None:
                return own(x.float())
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(x.float(), head.weight.float(), bias)

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
        if own is not None:
            vars(head)["forward"] = own
