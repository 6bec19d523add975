"""Whole rows that every rank of a group is given: cut for the model, and what it finds made whole again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...config import resolve_chunk_tokens
from ...labels import IGNORE_INDEX, check_padding
from ...layout import ChunkPlan
from ...parallel import MARKS, Rows, SequenceParallelGroup, ShardingCollator, gathered, lengths_under
from ..settings import Settings

# By tokens, or read by the cut.
_MARKS = (*MARKS, "position_ids")
_CUT = frozenset({*_MARKS, "input_ids", "attention_mask"})


@dataclass(frozen=True)
class Cut:
    """How whole rows were cut for this rank.

    Attributes:
        plan: of the rows, filled up.
        n_tokens: of a row before.
        rows: how rows of several lengths became one; None: they did not.
    """

    group: SequenceParallelGroup
    plan: ChunkPlan
    n_tokens: int
    rows: Rows | None = None

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each rank found of its own tokens, [B, S/P] by name, as [B, S] each."""
        wide = own["log_probs"].dtype
        found = gathered(self.group, self.plan, [value.to(wide) for value in own.values()])
        found = [value[:, : self.n_tokens] for value in found]
        found = found if self.rows is None else [self.rows.padded(value) for value in found]
        rows = {name: value.to(own[name].dtype) for name, value in zip(own, found, strict=True)}
        return {name: value if own[name].requires_grad else value.detach() for name, value in rows.items()}


def cut_rows(
    settings: Settings, arguments: dict[str, Any], targets_BS: Tensor, *, may_join: bool
) -> tuple[Cut, dict[str, Any], Tensor]:
    """This rank's part of whole rows.

    Args:
        arguments: of the model, without labels; rows begin with a token.
        targets_BS: the next token of each position.
        may_join: whether rows of several lengths may become one packed row, without their padding.

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
    joined = _joined(arguments, targets_BS) if may_join else None
    rows, whole = (None, {**arguments, "shift_labels": targets_BS}) if joined is None else joined
    on_gpu = arguments["input_ids"].is_cuda
    chunk_tokens, n_tokens = resolve_chunk_tokens(settings.plugin, on_gpu=on_gpu), whole["input_ids"].shape[1]
    own = ShardingCollator(dict, group.size, group.rank, chunk_tokens, two_each=settings.recurrent).cut(whole)
    targets, _ = own.pop("shift_labels"), own.pop("labels")
    return Cut(group, settings.plan_of(targets.shape[1], on_gpu=on_gpu), n_tokens, rows), own, targets


def _joined(arguments: dict[str, Any], targets_BS: Tensor) -> tuple[Rows, dict[str, Any]] | None:
    """Rows of several lengths, padded on the right, as one packed row; None where they are something else."""
    mask = arguments.get("attention_mask")
    if mask is None or mask.shape != targets_BS.shape or any(arguments.get(name) is not None for name in _MARKS):
        return None
    lengths = lengths_under(mask)
    if lengths is None:
        return None
    check_padding("hf_fpdt", mask == 0, targets_BS)
    rows = Rows.of(lengths, mask.shape[1], mask.device)
    packed = rows.packed({**arguments, "shift_labels": targets_BS})
    ends = packed["cu_seq_lens_q"][1:].long() - 1
    # No label at a document's end counts in a packed row; as rows they do.
    ended = bool((packed["shift_labels"][0, ends] == IGNORE_INDEX).all())
    return (rows, packed) if ended else None
