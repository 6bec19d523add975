"""Loss at each position of held-out windows: is the far context readable, and is it used?

Position p is the loss of predicting token p from the p tokens before it (p = 1, 2, ...). The decoder runs once a
window; the head then runs on slices of the hidden states, so logits of the whole sequence never exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...labels import IGNORE_INDEX, shifted
from ...layout import ChunkPlan
from ...model import FPDTHandle
from ...parallel import SequenceParallelGroup, own_tokens
from .curves import Curve

LOGIT_SLICE_TOKENS = 1024
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class Cut:
    """How a window is shared by a sequence-parallel group: which tokens are this process's, and whose are the rest."""

    group: SequenceParallelGroup
    plan: Callable[[int], ChunkPlan]

    @classmethod
    def of(cls, handle: FPDTHandle, chunk_tokens: int) -> Cut:
        """As the model behind `handle` takes its batches."""
        group = handle.group
        return cls(group, lambda n_tokens: ChunkPlan(n_tokens + -n_tokens % group.size, chunk_tokens, group.size))

    def own(self, input_ids_BS: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """This process's tokens with their positions, as the model takes them, and the token that follows each."""
        n_tokens = input_ids_BS.shape[1]
        plan = self.plan(n_tokens)
        positions = own_tokens(plan, self.group.rank, input_ids_BS.device)
        filled = F.pad(input_ids_BS, (0, plan.n_tokens - n_tokens))
        following = shifted(input_ids_BS, fill=plan.n_tokens - n_tokens)
        batch = {"input_ids": filled[:, positions], "position_ids": positions.expand(len(filled), -1)}
        return batch, following[:, positions]

    def whole(self, own_BS: Tensor, n_tokens: int) -> Tensor:
        """[B, n_tokens] from every process's tokens."""
        plan = self.plan(n_tokens)
        if self.group.size == 1:
            return own_BS[:, :n_tokens]
        whole_BS = own_BS.new_empty(len(own_BS), plan.n_tokens)
        for rank, part in enumerate(self.group.gather(own_BS)):
            whole_BS[:, own_tokens(plan, rank, part.device)] = part
        return whole_BS[:, :n_tokens]


WHOLE = Cut(SequenceParallelGroup(), lambda n_tokens: ChunkPlan(n_tokens, n_tokens))


def _hidden_and_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states of every token and logits of the last, from one call of the model, wrapped or not."""
    causal_lm: Any = _causal_lm(model)
    kept: list[Tensor] = []
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    hook = decoder.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    try:
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    return kept[0], logits


def _causal_lm(model: nn.Module) -> Any:
    inner: Any = model.module if hasattr(model, "module") else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@torch.no_grad()
def token_losses(
    model: nn.Module, input_ids_BS: Tensor, slice_tokens: int = LOGIT_SLICE_TOKENS, cut: Cut = WHOLE
) -> Tensor:
    """Cross entropy of every predicted token, [B, S - 1] in float32, from slices of at most slice_tokens logits."""
    batch, following_BS = cut.own(input_ids_BS)
    hidden_BSD, last_logits = _hidden_and_logits(model, batch)
    head = _causal_lm(model).get_output_embeddings()
    _check_head(head(hidden_BSD[:, -1:]), last_logits)
    losses = []
    for hidden, labels in zip(hidden_BSD.split(slice_tokens, 1), following_BS.split(slice_tokens, 1), strict=True):
        logits = head(hidden).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX))
    return cut.whole(torch.cat(losses, dim=1), input_ids_BS.shape[1])[:, :-1]


def _check_head(ours: Tensor, models: Tensor) -> None:
    """Refuse a model whose logits are not simply head(hidden states), such as one that scales or caps them."""
    if not torch.allclose(ours.float().log_softmax(-1), models.float().log_softmax(-1), rtol=2e-2, atol=2e-2):
        raise NotImplementedError(
            "loss by position: this model changes its logits after the head; it can't be sliced here"
        )


def measure(
    model: nn.Module,
    windows: Sequence[dict[str, Tensor]],
    label: str,
    report: Callable[[str], None],
    cut: Cut = WHOLE,
) -> Curve:
    """The curve of one model state over equally long windows."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    reported = time.monotonic()
    for window in windows:
        rows.append(token_losses(model, window["input_ids"][None].to(device), cut=cut).float().cpu())
        if len(rows) == len(windows) or time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            report(f"evaluating {label}: window {len(rows)} of {len(windows)}, mean loss {torch.cat(rows).mean():.4f}")
    model.train(was_training)
    return Curve(label, torch.cat(rows))
