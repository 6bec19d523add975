"""The Triton kernels of `passes`: one program a row, each element read and written once; imported where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routes import Routes

BLOCK, WARPS = 1024, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 256, 2  # of the gate, whose backward pass has most numbers at hand


def gather(x_TD: Tensor, routes: Routes, dtype: torch.dtype, bias_ED: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `passes.gather_rows`."""
    x, count, width = x_TD.contiguous(), len(routes.order_S), x_TD.shape[1]
    rows_SD = torch.empty(count, width, dtype=dtype, device=x.device)
    dots_S = torch.empty(count, dtype=torch.float32, device=x.device)
    _gather_row[(count,)](
        x,
        routes.order_S,
        rows_SD,
        dots_S,
        routes.experts_S,
        None if bias_ED is None else bias_ED.contiguous(),
        len(routes.offsets_E),
        VISITED=routes.experts_TK.shape[1],
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return rows_SD, dots_S


def combine(
    rows_SD: Tensor, routes: Routes, dtype: torch.dtype, weights_TK: Tensor | None, bias_ED: Tensor | None
) -> Tensor:
    """As `passes.sum_rows`."""
    (tokens, visited), width = routes.experts_TK.shape, rows_SD.shape[1]
    sums_TD = torch.empty(tokens, width, dtype=dtype, device=rows_SD.device)
    _sum_rows[(tokens,)](
        rows_SD.contiguous(),
        routes.places_TK,
        routes.experts_TK.contiguous(),
        None if weights_TK is None else weights_TK.contiguous(),
        None if bias_ED is None else bias_ED.contiguous(),
        sums_TD,
        len(routes.offsets_E),
        VISITED=visited,
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return sums_TD


def gate_forward(
    numbers: tuple[float, ...],
    interleaved: bool,
    gate_up_SJ: Tensor,
    bias_EJ: Tensor | None,
    routes: Routes,
    weights_S: Tensor | None,
) -> Tensor:
    """As `passes.Gate.forward`; the numbers are in the order of its attributes."""
    rows, width = gate_up_SJ.contiguous(), gate_up_SJ.shape[1] // 2
    hidden_SI = rows.new_empty(len(rows), width)
    _gate_row[(len(rows),)](
        rows,
        None if bias_EJ is None else bias_EJ.contiguous(),
        routes.experts_S,
        None,
        None if weights_S is None else weights_S.contiguous(),
        hidden_SI,
        None,
        None,
        len(routes.offsets_E),
        *numbers,
        INTERLEAVED=interleaved,
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return hidden_SI


def gate_backward(
    numbers: tuple[float, ...],
    interleaved: bool,
    gate_up_SJ: Tensor,
    bias_EJ: Tensor | None,
    routes: Routes,
    d_hidden_SI: Tensor,
    weights_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `passes.Gate.backward`."""
    rows, width = gate_up_SJ.contiguous(), gate_up_SJ.shape[1] // 2
    d_rows, d_weights_S = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    _gate_row[(len(rows),)](
        rows,
        None if bias_EJ is None else bias_EJ.contiguous(),
        routes.experts_S,
        d_hidden_SI.contiguous(),
        weights_S.contiguous(),
        None,
        d_rows,
        d_weights_S,
        len(routes.offsets_E),
        *numbers,
        INTERLEAVED=interleaved,
        WIDTH=width,
        BLOCK=BACKWARD_BLOCK,
        num_warps=BACKWARD_WARPS,
    )
    return d_rows, d_weights_S


@triton.jit
def _gather_row(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows none for pointers
    x_ptr,
    order_ptr,
    rows_ptr,
    dots_ptr,
    experts_ptr,
    bias_ptr,
    experts,
    VISITED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += tl.load(order_ptr + row) // VISITED * WIDTH
    rows_ptr += row * WIDTH
    if bias_ptr is not None:
        bias_ptr += tl.minimum(tl.load(experts_ptr + row), experts - 1).to(tl.int64) * WIDTH
        dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < WIDTH, other=0.0)
        tl.store(rows_ptr + at, x.to(rows_ptr.dtype.element_ty), mask=at < WIDTH)
        if bias_ptr is not None:
            dots += x.to(tl.float32) * tl.load(bias_ptr + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        tl.store(dots_ptr + row, tl.sum(dots, 0))
    else:
        tl.store(dots_ptr + row, 0.0)


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    rows_ptr,
    places_ptr,
    experts_ptr,
    weights_ptr,
    bias_ptr,
    sums_ptr,
    experts,
    VISITED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for visit in tl.static_range(VISITED):
            expert = tl.load(experts_ptr + token * VISITED + visit).to(tl.int64)
            place = tl.load(places_ptr + token * VISITED + visit)
            there = (at < WIDTH) & (expert < experts)
            row = tl.load(rows_ptr + place * WIDTH + at, mask=there, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                row += tl.load(bias_ptr + expert * WIDTH + at, mask=there, other=0.0).to(tl.float32)
            if weights_ptr is not None:
                row *= tl.load(weights_ptr + token * VISITED + visit).to(tl.float32)
            total += tl.where(there, row, 0.0)
        tl.store(sums_ptr + token * WIDTH + at, total.to(sums_ptr.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _halves(rows_ptr, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERLEAVED:
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        rows = tl.load(rows_ptr + both, mask=both < 2 * WIDTH, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(rows, (BLOCK, 2)))
    else:
        at = start + tl.arange(0, BLOCK)
        gate = tl.load(rows_ptr + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        up = tl.load(rows_ptr + WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _gate_row(  # type: ignore[no-untyped-def]
    rows_ptr,
    bias_ptr,
    experts_ptr,
    d_hidden_ptr,
    weights_ptr,
    hidden_ptr,
    d_rows_ptr,
    d_weights_ptr,
    experts,
    alpha,
    shift,
    gate_max,
    up_min,
    up_max,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows_ptr += row * 2 * WIDTH
    if bias_ptr is not None:
        bias_ptr += tl.minimum(tl.load(experts_ptr + row), experts - 1).to(tl.int64) * 2 * WIDTH
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    if d_hidden_ptr is not None:
        d_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw_gate, raw_up = _halves(rows_ptr, start, WIDTH, BLOCK, INTERLEAVED)
        if bias_ptr is not None:
            gate_bias, up_bias = _halves(bias_ptr, start, WIDTH, BLOCK, INTERLEAVED)
            raw_gate += gate_bias
            raw_up += up_bias
        # Not minimum and maximum, which lose a NaN.
        gate = tl.where(raw_gate > gate_max, gate_max, raw_gate)
        up = tl.where(raw_up < up_min, up_min, tl.where(raw_up > up_max, up_max, raw_up)) + shift
        sigmoid = tl.sigmoid(alpha * gate)
        hidden = up * gate * sigmoid
        if d_hidden_ptr is not None:
            d_hidden = tl.load(d_hidden_ptr + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            d_weight += d_hidden * hidden
            d_hidden *= weight
            d_gate = d_hidden * up * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
            d_gate = tl.where(raw_gate > gate_max, 0.0, d_gate).to(d_rows_ptr.dtype.element_ty)
            d_up = tl.where((raw_up < up_min) | (raw_up > up_max), 0.0, d_hidden * gate * sigmoid)
            d_up = d_up.to(d_rows_ptr.dtype.element_ty)
            d_row_ptr = d_rows_ptr + row * 2 * WIDTH
            if INTERLEAVED:
                both = 2 * start + tl.arange(0, 2 * BLOCK)
                tl.store(d_row_ptr + both, tl.interleave(d_gate, d_up), mask=both < 2 * WIDTH)
            else:
                tl.store(d_row_ptr + at, d_gate, mask=at < WIDTH)
                tl.store(d_row_ptr + WIDTH + at, d_up, mask=at < WIDTH)
        if hidden_ptr is not None:
            if weights_ptr is not None:
                hidden *= weight
            tl.store(hidden_ptr + row * WIDTH + at, hidden.to(hidden_ptr.dtype.element_ty), mask=at < WIDTH)
    if d_hidden_ptr is not None:
        tl.store(d_weights_ptr + row, tl.sum(d_weight, 0))
