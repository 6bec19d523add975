"""Attention of whole tensors, differentiable: what the name "fpdt" means without the layer executor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import (
    AttentionSpec,
    Kernel,
    backward_row,
    forward_row,
    row_calls,
    select_kernel,
    sinks_gradient,
)
from ..layout import Documents, Span
from ..memory import KVStore
from .replay_state import Autocast


def attend_whole(
    q_BSNH: Tensor,
    k_BTGH: Tensor,
    v_BTGH: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Exact causal attention of whole tensors, differentiable; the last query is aligned with the last key.

    Args:
        q_BSNH: queries [B, S, N, H]; S may be less than T (a prompt continued on a cache).
        k_BTGH, v_BTGH: keys and values [B, T, G, H], G a divisor of N; values may have another H.
        scale: factor of the scores before softmax.
        window: keys that a query sees, its own among them; None: all before it. A `layout.Block`: those of its block.
        softcap: bound of the scores, softcap · tanh(score / softcap).
        sinks_N: of each head the score of a key without a value (attention sinks), differentiable.
        kernel: a name of `hf_fpdt.attention.KERNELS` or "auto".

    Returns:
        out [B, S, N, H of V] in the dtype of q.

    Raises:
        ValueError: the shapes do not fit together, or the window is not positive.
        NotImplementedError: no kernel serves, or the named one does not.
    """
    kind: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks_N": sinks_N, "kernel": kernel}
    return _attend((q_BSNH, k_BTGH, v_BTGH), None, **kind)


def attend_documents(q_1TNH: Tensor, k_1TGH: Tensor, v_1TGH: Tensor, documents: Documents, **kind: Any) -> Tensor:
    """Exact causal attention of a packed row, whose queries see keys of their own document alone; differentiable.

    Args:
        q_1TNH, k_1TGH, v_1TGH: one row of `documents.n_tokens` queries, keys and values.
        documents: of the row.
        kind: `scale` and what else `attend_whole` takes.

    Returns:
        out [1, T, N, H of V] in the dtype of q.

    Raises:
        ValueError, NotImplementedError: as `attend_whole`, or the row is another one than the documents are of.
    """
    return _attend((q_1TNH, k_1TGH, v_1TGH), documents, **kind)


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    documents: Documents | None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    q_BSNH, k_BTGH, v_BTGH = qkv
    _check_shapes(q_BSNH, k_BTGH, v_BTGH)
    if documents is not None and (
        q_BSNH.shape[:2] != (1, documents.n_tokens) or k_BTGH.shape[1] != documents.n_tokens
    ):
        raise ValueError(
            f"hf_fpdt: attend_documents of {documents.n_tokens:,} tokens with q {tuple(q_BSNH.shape)}, k "
            f"{tuple(k_BTGH.shape)}: one row of as many queries and keys is expected."
        )
    if window is not None and window < 1:
        raise ValueError(f"hf_fpdt: attend_whole(window={window}): a positive number of keys, or None, is expected.")
    window = window if window is not None and window < k_BTGH.shape[1] else None
    packed = documents is not None
    spec = AttentionSpec.of(q_BSNH, k_BTGH, v_BTGH, scale, window=window, softcap=softcap, packed=packed)
    chosen = select_kernel(kernel, q_BSNH.device, q_BSNH.dtype, spec)
    return _WholeAttention.apply(chosen, spec, (window, documents), q_BSNH, k_BTGH, v_BTGH, sinks_N)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = k.shape[:3] == v.shape[:3] and q.shape[::3] == k.shape[::3] and q.shape[2] % k.shape[2] == 0
    if not fits or q.shape[1] > k.shape[1]:
        raise ValueError(
            f"hf_fpdt: attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as [batch, tokens, "
            "heads, head_dim]: k and v of one shape but for head_dim, query heads a multiple of key/value heads, no "
            "more queries than keys."
        )


Reach = tuple[int | None, Documents | None]  # the window, and the documents


def _rows(kernel: Kernel, reach: Reach, q: Tensor, kv: KVStore) -> Iterator[tuple[slice, tuple[Span, ...]]]:
    """(queries, spans) of each row of whole tensors."""
    left_of_q, (window, documents) = kv.plan.n_tokens - q.shape[1], reach
    for start in range(0, q.shape[1], kernel.row_tokens):
        row = left_of_q + start, left_of_q + min(start + kernel.row_tokens, q.shape[1])
        for queries, spans in row_calls(kernel, row, kernel.row_tokens, kv, window=window, documents=documents):
            yield slice(start + queries.start, start + queries.stop), spans


class _WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        spec: AttentionSpec,
        reach: Reach,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        kv = KVStore.holding(k, v)
        with torch.cuda.device_of(q):
            parts = [
                forward_row(kernel, q[:, rows], kv.stream(spans), spec=spec, sinks_N=sinks)
                for rows, spans in _rows(kernel, reach, q, kv)
            ]
        out = torch.cat([part[0] for part in parts], dim=1)
        ctx.save_for_backward(q, k, v, out, torch.cat([part[1] for part in parts], dim=2), sinks)
        ctx.kernel, ctx.spec, ctx.reach, ctx.autocast = kernel, spec, reach, Autocast.now(q.device)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        kv = KVStore.holding(k, v)
        dq, d_sinks = torch.empty_like(q), None if sinks is None else torch.zeros_like(sinks, dtype=lse.dtype)
        with ctx.autocast.again():  # backward may be called inside an autocast that forward was outside of
            for rows, spans in _rows(ctx.kernel, ctx.reach, q, kv):
                row = out[:, rows], lse[:, :, rows].contiguous()
                dq[:, rows] = backward_row(ctx.kernel, dout[:, rows], q[:, rows], row, kv, spans, spec=ctx.spec)
                if d_sinks is not None:
                    d_sinks += sinks_gradient(dout[:, rows], row, sinks)
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return None, None, None, dq, *kv.take_grad(kv.plan.chunks[0]), d_sinks
