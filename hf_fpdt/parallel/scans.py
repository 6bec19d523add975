"""Recurrent layers over ranks: heads exchanged around a scan, and the tokens that a convolution needs from the left.

A chunk is cut among P ranks, each with S/P tokens in a row. A scan goes through all S in order, for each head by
itself: so heads are exchanged for pieces of the sequence before it, as for attention, and back after it. A convolution
of kernel K gets the last K inputs of the tokens on its left: of other ranks, and of the chunk before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .group import SequenceParallelGroup, repeat_heads

STATES = ("initial_state", "initial_states")


class _ToHeads(torch.autograd.Function):
    """Pieces of all heads, of one dtype → whole chunks of a rank's own; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, group: SequenceParallelGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return group.seq_to_heads(*parts)

    @staticmethod
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.group.heads_to_seq(*d_parts)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceParallelGroup, part: Tensor) -> Tensor:
        ctx.group = group
        return group.heads_to_seq(part)[0].contiguous()  # models take views of it

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.group.seq_to_heads(d_part)[0]


class _Halo(torch.autograd.Function):
    """What every rank needs of the inputs on its left is gathered; so is, in backward, what they got for it."""

    @staticmethod
    def forward(ctx: Any, group: SequenceParallelGroup, state: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        kernel = state.shape[-1]
        tails = group.gather(new[..., -kernel:])
        ctx.group, ctx.shapes = group, (state.shape, new.shape, tails[0].shape[-1])
        before = torch.cat([state, *tails[: group.rank]], dim=-1)[..., -kernel:]
        return before, torch.cat([state, *tails], dim=-1)[..., -kernel:]

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        group, (state, new, tail) = ctx.group, ctx.shapes
        kernel, wide = state[-1], torch.promote_types(d_before.dtype, torch.float32)
        sums = d_before.new_zeros(*state[:-1], kernel + group.size * tail, dtype=wide)
        left = kernel + group.rank * tail
        sums[..., left - kernel : left] += d_before
        sums[..., -kernel:] += d_last
        d_tails = group.sum(sums[..., kernel:].contiguous())
        d_new = d_before.new_zeros(new)
        d_new[..., -tail:] = d_tails[..., group.rank * tail : (group.rank + 1) * tail]
        return None, sums[..., :kernel].to(d_before.dtype), d_new


def inputs_before(group: SequenceParallelGroup, state_BCK: Tensor, new_BCS: Tensor) -> tuple[Tensor, Tensor]:
    """The K inputs of a convolution before this rank's tokens, and the last K of the whole chunk; differentiable.

    Args:
        state_BCK: the last K before the chunk, the same on every rank; its gradient is this rank's share.
        new_BCS: the rank's own, S/P of them.

    Returns:
        [B, C, K] each; the second the same on every rank, and its gradient may be in shares.
    """
    if group.size == 1:
        inputs = torch.cat([state_BCK, new_BCS[..., -state_BCK.shape[-1] :]], dim=-1)
        return state_BCK, inputs[..., -state_BCK.shape[-1] :]
    before, last = _Halo.apply(group, state_BCK, new_BCS)
    return before, last


def heads_of_scan(arguments: Mapping[Any, Any]) -> dict[Any, int]:
    """Of the arguments of a scan that are [B, S, heads, ...] each one's heads, by name or place.

    Batch and tokens are those of the first of them: queries, or what a Mamba-2 scans.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and name not in STATES}
    rows = next(value.shape[:2] for value in tensors.values() if value.dim() >= 3)
    return {name: value.shape[2] for name, value in tensors.items() if value.dim() >= 3 and value.shape[:2] == rows}


def why_not_scan_heads(heads: Sequence[int], ranks: int) -> str | None:
    """Why so many ranks cannot share a scan of inputs with these heads; None if they can."""
    fits = [n for n in range(1, max(heads, default=1) + 1) if _repeats(heads, n) is not None]
    if _repeats(heads, ranks) is not None:
        return None
    return (
        f"sp_size={ranks} does not divide the {max(heads)} heads of its recurrence (its inputs have "
        f"{', '.join(map(str, sorted(set(heads))))}); take one of {', '.join(map(str, fits))}"
    )


def _repeats(heads: Sequence[int], ranks: int) -> list[int] | None:
    """How often the heads of each input are repeated, so that a rank's fit to one another; None where they cannot."""
    most, times = max(heads, default=ranks), [math.lcm(each, ranks) // each for each in heads]
    if most % ranks or any(most % (each * n) for each, n in zip(heads, times, strict=True)):
        return None
    return times


def over_ranks(scan: Callable[..., Any], group: SequenceParallelGroup) -> Callable[..., Any]:
    """The scan of whole chunks for a rank's own heads, given and giving the rank's tokens for all heads.

    States that come in and go out are of the rank's own heads. Gradients of what is there once for each head, such as
    the decay of a Mamba-2, are the rank's share.

    Raises:
        NotImplementedError: ranks cannot share these heads.
    """

    def shared(*args: Any, **kwargs: Any) -> Any:
        given = dict(enumerate(args)) | kwargs
        heads = heads_of_scan(given)
        repeats = _repeats(list(heads.values()), group.size)
        if repeats is None:
            why = why_not_scan_heads(list(heads.values()), group.size)
            raise NotImplementedError(f"hf_fpdt: a recurrent layer cannot be shared by ranks: {why}.")
        times = dict(zip(heads, repeats, strict=True))
        most = max(heads.values())
        dtypes = {name: given[name].dtype for name in heads}
        for dtype in dict.fromkeys(dtypes.values()):  # in the same order on every rank
            names = [name for name in heads if dtypes[name] == dtype]
            parts = [repeat_heads(_in_four(given[name]), times[name]) for name in names]
            for name, whole in zip(names, _ToHeads.apply(group, *parts), strict=True):
                given[name] = whole if given[name].dim() == 4 else whole.squeeze(3)
        for name, value in given.items():
            if isinstance(value, Tensor) and name not in heads and name not in STATES and value.shape[:1] == (most,):
                given[name] = value[group.own_heads(most)]
        result = scan(*(given[place] for place in range(len(args))), **{name: given[name] for name in kwargs})
        output, *others = result if isinstance(result, tuple) else (result,)
        output = _ToSequence.apply(group, output)
        return (output, *others) if isinstance(result, tuple) else output

    return shared


def _in_four(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(3)
