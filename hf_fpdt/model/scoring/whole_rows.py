"""Whole rows that every rank of a group is given: cut for the model, and what it finds made whole again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...config import resolve_chunk_tokens
from ...layout import ChunkPlan
from ...parallel import MARKS, SequenceParallelGroup, ShardingCollator, gathered
from ..settings import Settings

# By tokens, or read by the cut.
_CUT = frozenset({*MARKS, "input_ids", "attention_mask", "position_ids"})


@dataclass(frozen=True)
class Cut:
    """How whole rows were cut for this rank.

    Attributes:
        plan: of the rows, filled up.
        n_tokens: of a row as it was given.
    """

    group: SequenceParallelGroup
    plan: ChunkPlan
    n_tokens: int

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each rank found of its own tokens, [B, S/P] by name, as [B, S] each."""
        wide = own["log_probs"].dtype
        found = gathered(self.group, self.plan, [value.to(wide) for value in own.values()])
        rows = {name: value[:, : self.n_tokens].to(own[name].dtype) for name, value in zip(own, found, strict=True)}
        return {name: value if own[name].requires_grad else value.detach() for name, value in rows.items()}


def cut_rows(settings: Settings, arguments: dict[str, Any], targets_BS: Tensor) -> tuple[Cut, dict[str, Any], Tensor]:
    """This rank's part of whole rows.

    Args:
        arguments: of the model, without labels; rows begin with a token.
        targets_BS: the next token of each position.

    Returns:
        The cut; the arguments of this rank's part, with what `told_by` takes; its targets [B, S/P].

    Raises:
        NotImplementedError, ValueError: as `ShardingCollator`; something that is not cut by tokens is in them.
    """
    shape, group = targets_BS.shape, settings.group
    others = [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dim() and name not in _CUT and value.shape[:2] != shape
    ]
    if others or arguments.get("input_ids") is None:
        what = f"{', '.join(others)} cannot be cut with them" if others else "there are no input_ids"
        raise NotImplementedError(
            f"hf_fpdt: with sp_size above 1 rows of token ids are cut over ranks, and {what}: set sp_size=1."
        )
    on_gpu, recurrent = arguments["input_ids"].is_cuda, any(mix.states for mix in settings.sizes.mixes)
    chunk_tokens = resolve_chunk_tokens(settings.plugin, on_gpu=on_gpu)
    collator = ShardingCollator(dict, group.size, group.rank, chunk_tokens, two_each=recurrent)
    own = collator.cut({**arguments, "shift_labels": targets_BS})
    targets, _ = own.pop("shift_labels"), own.pop("labels")
    return Cut(group, settings.plan_of(targets.shape[1], on_gpu=on_gpu), shape[1]), own, targets
