"""Attention of whole tensors, differentiable: what the name "fpdt" means without the layer executor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import AttentionSpec, Kernel, backward_row, forward_row, kernel_spans, select_kernel
from ..layout import Span
from ..memory import KVStore
from .replay_state import Autocast


def attend_whole(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, *, scale: float, kernel: str = "auto") -> Tensor:
    """Exact causal attention of whole tensors, differentiable; the last query is aligned with the last key.

    Args:
        q_BSNH: queries [B, S, N, H]; S may be less than T (a prompt continued on a cache).
        k_BTGH, v_BTGH: keys and values [B, T, G, H], G a divisor of N.
        scale: factor of the scores before softmax.
        kernel: a name of `hf_fpdt.kernels` or "auto".

    Returns:
        out [B, S, N, H] in the dtype of q.

    Raises:
        ValueError: the shapes do not fit together.
        NotImplementedError: no kernel serves, or the named one does not.
    """
    _check_shapes(q_BSNH, k_BTGH, v_BTGH)
    spec = AttentionSpec.of(q_BSNH, k_BTGH, v_BTGH, scale)
    chosen = select_kernel(kernel, q_BSNH.device, q_BSNH.dtype, spec)
    return _WholeAttention.apply(chosen, spec, q_BSNH, k_BTGH, v_BTGH)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = k.shape == v.shape and q.shape[::3] == k.shape[::3] and q.shape[2] % k.shape[2] == 0
    if not fits or q.shape[1] > k.shape[1]:
        raise ValueError(
            f"hf_fpdt: attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as [batch, tokens, "
            "heads, head_dim]: k and v of one shape, query heads a multiple of key/value heads, no more queries than "
            "keys."
        )


def _rows(kernel: Kernel, q: Tensor, kv: KVStore) -> Iterator[tuple[slice, tuple[Span, ...]]]:
    """(queries, spans) of each row of whole tensors."""
    left_of_q = kv.plan.n_tokens - q.shape[1]
    for start in range(0, q.shape[1], kernel.row_tokens):
        stop = min(start + kernel.row_tokens, q.shape[1])
        yield slice(start, stop), kernel_spans(kernel, (left_of_q + start, left_of_q + stop), kernel.row_tokens, kv)


class _WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = KVStore.holding(k, v)
        with torch.cuda.device_of(q):
            parts = [
                forward_row(kernel, q[:, rows], kv.stream(spans), spec=spec) for rows, spans in _rows(kernel, q, kv)
            ]
        out = torch.cat([part[0] for part in parts], dim=1)
        ctx.save_for_backward(q, k, v, out, torch.cat([part[1] for part in parts], dim=2))
        ctx.kernel, ctx.spec, ctx.autocast = kernel, spec, Autocast.now(q.device)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kv = KVStore.holding(k, v)
        dq = torch.empty_like(q)
        with ctx.autocast.again():  # backward may be called inside an autocast that forward was outside of
            for rows, spans in _rows(ctx.kernel, q, kv):
                row = out[:, rows], lse[:, :, rows].contiguous()
                dq[:, rows] = backward_row(ctx.kernel, dout[:, rows], q[:, rows], row, kv, spans, spec=ctx.spec)
        return None, None, dq, *kv.take_grad(kv.plan.chunks[0])
