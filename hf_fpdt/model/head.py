"""The model outside of its layers: final norm, head and loss, on the model's own code, in chunks.

The head is whatever the model's own forward does after its base model: `lm_head`, a scale, a softcap. It is run on a
slice of hidden states by running that forward with the base model standing aside, so nothing here knows architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..config import resolve_chunk_tokens
from ..engine import (
    RandomState,
    chunked_loss,
    mixes_tokens,
    norm_by_chunks,
    untouched_random_state,
    visiting,
)
from ..labels import IGNORE_INDEX
from ..parallel import (
    PADDING_KEY,
    SAMPLE_KEY,
    Packing,
    Rows,
    batch_of,
    batch_shape,
    batch_shared_by,
    check_shard,
    marks_of,
    pack_arguments,
    ranks_of_batch,
)
from .layers import base_of, check_stack, decoder_layers, decoder_of
from .patch import arguments_by_name, caches_in, is_patched, patch
from .refusals import check_loss_arguments, homes_of
from .scoring.head_call import (
    WHY_NOT_WHOLE,
    HeadCall,
    as_head_call,
    current_head_call,
    described_head,
    head_after,
    heads_of,
    may_join,
    targets_of,
    told_by,
    told_of_batch,
    with_fields,
    without_fsdp,
)
from .scoring.log_probs import TRLS, answer, taken_request, trls_request
from .scoring.router import (
    ARGUMENT,
    COEFFICIENT,
    TURN_OFF,
    count_all_tokens,
    wants_router_loss,
    why_no_router_loss,
)
from .settings import Settings

# Who may put a forward of theirs in place of a model's: they call the model's own, and leave its loss alone. (Liger's,
# which does not, has a reason of its own.)
_WRAP_FORWARD = ("transformers.", "accelerate.", "torch.", "peft.", "trl.", "liger_kernel.", "hf_fpdt.")


def loss_reasons(model: Any) -> list[str]:
    """Reasons why the loss that the model makes of labels is not the one computed here; [] if it is."""
    if model.get_output_embeddings() is None:
        return []
    reasons = []
    if wants_router_loss(model.config, {}) and (
        why := why_no_router_loss(model, decoder_of(model), decoder_layers(model))
    ):
        reasons.append(f"the router's auxiliary loss is not served: {why}. {TURN_OFF[:-1]}")
    if model.loss_function is not ForCausalLMLoss:
        reasons.append(
            "its loss function is not transformers' ForCausalLMLoss, which is the one FPDT computes in chunks"
        )
    homes = dict.fromkeys(homes_of(model.forward), _WRAP_FORWARD) | {
        type(model).forward.__module__: ("transformers.",)
    }
    foreign = [home for home, known in homes.items() if not home.startswith(known)]
    if foreign:
        reasons.append(
            f"its forward ({', '.join(foreign)}) is not one of transformers' own, so the loss that it makes of labels "
            "is not known; let it inherit forward, or train it without apply_fpdt"
        )
    return reasons


def unshared_loss_reasons(model: Any) -> list[str]:
    """Reasons why ranks that hold a part of the sequence each would make another loss than one process; or []."""
    if not any(home.startswith("trl.") for home in homes_of(model.forward)) or trls_request(model.forward) is not None:
        return []
    return [
        "TRL's forward is not that of TRL 1.15 and later (fused_lm_head), so its loss would be made of a rank's own "
        "labels; take such a release, or FPDTTrainer"
    ]


def patch_head(model: Any, settings: Settings) -> None:
    """Patch the final norm and, where the model has a head, its base model and itself."""
    for child in decoder_of(model).children():
        if "norm" in type(child).__name__.lower() and not isinstance(child, nn.Embedding):
            patch(child, _norm_forward, settings)
    patch(base_of(model), _base_forward, settings)
    if model.get_output_embeddings() is not None:
        patch(model, _causal_lm_forward, settings)
    elif base_of(model) is not model:
        patch(model, _other_head_forward, settings)


def _norm_forward(self: Any, hidden: Tensor) -> Tensor:
    if hidden.is_meta:
        return hidden
    if visiting() and mixes_tokens(self._fpdt.forward, hidden):
        raise NotImplementedError(f"its final norm ({type(self).__name__}) looks at other tokens than one")
    settings = self._fpdt.settings
    if ranks_of_batch() == settings.group.size:
        plan = settings.plan(hidden)
        size = plan.chunk_tokens // plan.sp_size
    else:  # what is generated is whole on every rank, a token at a time
        size = resolve_chunk_tokens(settings.plugin, on_gpu=hidden.is_cuda)
    return norm_by_chunks(self._fpdt.forward, hidden, list(self.parameters()), size)


def _base_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    sample = kwargs.pop(SAMPLE_KEY, told_of_batch().sample)
    kwargs.pop(PADDING_KEY, None)
    call = current_head_call()
    if call is not None and call.outputs is not None:
        return call.outputs
    arguments = arguments_by_name(self._fpdt.signature, *args, **kwargs)
    if visiting():
        # Behind a cache no mask is looked for in positions, which those without memory cannot be asked.
        bare = any(p.is_meta for p in self.parameters())
        outputs = self._fpdt.forward(**arguments | {"use_cache": bare})
        if call is not None:
            call.outputs = outputs
        return outputs
    check_stack(self, self._fpdt.settings)
    _check_kernel(self, arguments)
    _check_router(arguments)
    if wants_router_loss(self.config, arguments):
        arguments[ARGUMENT] = False
    # With a cache it is generation, in which every rank has the whole of a sequence.
    group, generates = self._fpdt.settings.group, bool(caches_in(arguments))
    ranks, shape = 1 if generates else group.size, batch_shape(arguments)
    packing = Packing() if generates else _packing(self, arguments, ranks)
    if ranks > 1:
        check_shard(arguments, sample, group, self._fpdt.settings.plan, packing.documents)
    if ranks > 1 or any(packing):
        arguments["use_cache"] = False
    if packing.rows is not None:
        count_all_tokens()
    if torch.is_grad_enabled():
        row = packing.rows.documents if packing.rows is not None else packing.documents
        self._fpdt.settings.packed = None if row is None else (shape, row)
    with batch_shared_by(ranks), batch_of(packing.documents), _embeddings_as_they_are(self):
        outputs = self._fpdt.forward(**arguments)
    flat, outputs = outputs[0], outputs if packing.rows is None else _padded(outputs, packing.rows)
    if call is None:
        return outputs
    if call.whole:
        call.outputs, call.began = outputs, RandomState.now(outputs[0].device)
        return outputs
    call.outputs, call.packing = with_fields(outputs, last_hidden_state=flat), packing
    # One token is enough for the model to make its output object; that token's logits are dropped.
    return with_fields(call.outputs, last_hidden_state=call.outputs[0][:, :1])


@contextmanager
def _embeddings_as_they_are(base: Any) -> Iterator[None]:
    """Inside, embeddings want no gradient for the sake of checkpoints, which FPDT stands in for.

    `enable_input_require_grads` puts a hook on them that asks for one; Trainer, PEFT and TRL call it where they
    checkpoint. Autograd would then hold the embeddings to the end of the step, and make gradients that nobody reads.
    Where other hooks are, somebody may read them: they are made.
    """
    hooks = getattr(base.get_input_embeddings(), "_forward_hooks", {})
    aside = dict(hooks) if all(_asks_for_gradients(hook) for hook in hooks.values()) else {}
    for key in aside:
        del hooks[key]
    try:
        yield
    finally:
        hooks.update(aside)


def _asks_for_gradients(hook: Any) -> bool:
    return str(getattr(hook, "__name__", "")).startswith("make_inputs_require_grad")


def _check_kernel(model: Any, arguments: dict[str, Any]) -> None:
    """Of what runs in chunks; a model may have been moved since FPDT was applied."""
    given = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    if given is not None and not caches_in(arguments):
        is_sharded = any(hasattr(layer, "unshard") for layer in decoder_layers(model))
        model._fpdt.settings.check_kernel(given.device, model.dtype, is_sharded=is_sharded)


def _packing(base: Any, arguments: dict[str, Any], ranks: int) -> Packing:
    """How it runs on a batch."""
    takes_positions = "position_ids" in base._fpdt.signature.parameters
    return pack_arguments(arguments, ranks=ranks, may_join=may_join(base), takes_positions=takes_positions)


def joins_rows(model: nn.Module) -> bool:
    """Whether rows of a batch may become one packed row for a model that FPDT was applied to, wrapped or not."""
    patched = (module for module in model.modules() if isinstance(module, PreTrainedModel) and is_patched(module))
    first = next(patched, None)
    return first is not None and may_join(base_of(first))


def _padded(outputs: Any, rows: Rows) -> Any:
    """A model's output, of one packed row, with the rows of the batch."""
    if isinstance(outputs, tuple):
        return rows.padded_each(outputs)
    return with_fields(outputs, **{name: rows.padded_each(value) for name, value in outputs.items()})


def _check_router(arguments: dict[str, Any]) -> None:
    if arguments.get(ARGUMENT):
        raise NotImplementedError(
            f"hf_fpdt: router logits are never whole; with labels their auxiliary loss is returned. {TURN_OFF}"
        )


def _other_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model whose head is no language model's: it runs on all tokens at once, by its own code.

    Padding on the right is not masked, so the head may not read it; that is looked at the first time there is some.
    """
    settings, arguments = self._fpdt.settings, arguments_by_name(self._fpdt.signature, *args, **kwargs)
    mask = arguments.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.dim() == 2 and not settings.padding_tried and bool((mask == 0).any())
    if not padded or visiting():
        return self._fpdt.forward(**arguments)
    with as_head_call(HeadCall(whole=True)) as call:
        outputs = self._fpdt.forward(**arguments)
    if call.outputs is not None and _reads_padding(self, arguments, outputs, call):
        raise NotImplementedError(
            f"hf_fpdt: the head of {type(self).__name__} reads padding, whose hidden states are not those of a masked "
            "model: give rows of one length (a batch of one row needs no padding)."
        )
    settings.padding_tried = True
    return outputs


def _reads_padding(model: Any, arguments: dict[str, Any], outputs: Any, call: HeadCall) -> bool:
    """Whether the head's loss is another one where the hidden states of padding are."""
    if (loss := _loss_of(outputs)) is None:
        return False
    hidden, padding_BS1 = call.outputs[0].detach(), (arguments["attention_mask"] == 0).unsqueeze(-1)
    other = with_fields(call.outputs, last_hidden_state=torch.where(padding_BS1.to(hidden.device), 1 - hidden, hidden))
    assert call.began is not None
    with torch.no_grad(), untouched_random_state(hidden.device), as_head_call(HeadCall(other)):
        call.began.restore()
        with without_fsdp(heads_of(model)):
            again = _loss_of(model._fpdt.forward(**arguments))
    return not torch.equal(loss.detach(), again)


def _loss_of(outputs: Any) -> Any:
    """The loss in a model's outputs, of either kind; None where there is none."""
    if isinstance(outputs, tuple):
        return outputs[0] if outputs[0].dim() == 0 else None
    return outputs.loss


def _causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if visiting():
        return _visited_forward(self, *args, **kwargs)
    with told_by(kwargs), marks_of(kwargs):
        if (request := taken_request(self._fpdt.forward, kwargs)) is not None:
            return answer(self, request, *args, **kwargs)
        if kwargs.get(TRLS):
            return self._fpdt.forward(*args, **kwargs)  # of another release: its head, of hidden states made here
        return _forward_with_loss(self, *args, **kwargs)


def _visited_forward(self: Any, **arguments: Any) -> Any:
    """The model's forward on a few tokens that no layer sees; its head is tried as layers are."""
    with as_head_call(HeadCall(whole=True)) as call:
        outputs = self._fpdt.forward(**arguments)
    if call.outputs is None:
        raise NotImplementedError(WHY_NOT_WHOLE.format(type(self).__name__))

    def logits_of(hidden: Tensor) -> Tensor:
        with as_head_call(HeadCall(with_fields(call.outputs, last_hidden_state=hidden))):
            logits: Tensor = self._fpdt.forward(**arguments).logits
        return logits

    if mixes_tokens(logits_of, call.outputs[0]):
        raise NotImplementedError(f"the head of {type(self).__name__} looks at other tokens than one")
    return outputs


def _forward_with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward. With `labels`: loss in chunks, `logits=None` unless `logits_to_keep` asks for some."""
    arguments = arguments_by_name(self._fpdt.signature, *args, **kwargs)
    if self.training and torch.is_grad_enabled():
        arguments["use_cache"] = False
    if arguments.get("labels") is None:
        _check_router(arguments)
        if wants_router_loss(self.config, arguments):  # by its configuration: there is no loss, and generate() may ask
            arguments[ARGUMENT] = False
        return self._fpdt.forward(**arguments)
    if self.loss_function is not ForCausalLMLoss:
        raise NotImplementedError(
            "hf_fpdt: the loss is computed in chunks, so a loss_function set on the model would not be called; call "
            "the model without labels and compute the loss from its logits."
        )
    check_loss_arguments(arguments)
    if arguments.get("shift_labels") is None and self._fpdt.settings.group.size > 1:
        raise ValueError(
            "hf_fpdt: with sp_size above 1 labels are shifted before they are cut: pass shift_labels too."
        )
    loss_arguments = {name: arguments.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
    ignore_index, kept = arguments.pop("ignore_index", IGNORE_INDEX), arguments.pop("logits_to_keep", None)
    as_tuple = arguments.pop("return_dict", self.config.return_dict) is False
    arguments["return_dict"] = True
    if not caches_in(arguments):
        arguments["use_cache"] = False

    ran = head_after(self, arguments)
    rows, hidden = ran.packing.rows, ran.hidden_BSD
    targets = targets_of(ran.packing, ignore_index, arguments.get("attention_mask"), loss_arguments)
    loss = _loss(self, hidden, ran.logits_of, ignore_index, targets, loss_arguments["num_items_in_batch"])
    whole = hidden if rows is None or kept is None else rows.padded(hidden)
    logits = None if kept is None else ran.logits_of(whole, logits_to_keep=kept)
    routers: dict[str, Any] = {}
    if ran.router_loss is not None:
        # Losses over a number of tokens are added up over ranks, and each has this one whole.
        ranks = 1 if loss_arguments["num_items_in_batch"] is None else self._fpdt.settings.group.size
        loss, routers = loss + getattr(self, COEFFICIENT) / ranks * ran.router_loss, {"aux_loss": ran.router_loss}
    outputs = with_fields(ran.outputs, loss=loss, logits=logits, **routers)
    return outputs.to_tuple() if as_tuple else outputs


def _loss(
    model: Any,
    hidden: Tensor,
    logits_of: Callable[..., Tensor],
    ignore_index: int,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    head = described_head(model, logits_of, ignore_index)
    group = model._fpdt.settings.group
    if num_items_in_batch is None and group.size > 1:
        # Then a plain mean of the ranks' losses (DDP, FSDP) is the mean over the sequence's tokens.
        num_items_in_batch = group.sum((targets != ignore_index).sum().to(hidden.device)) / group.size
    return chunked_loss(head, hidden, targets, num_items_in_batch)
