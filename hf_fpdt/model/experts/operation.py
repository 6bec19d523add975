"""Chosen experts forward and backward in one node of the graph: two grouped products, and few passes around them.

Transformers' own way gathers rows, adds biases by row, runs a gate of several steps, multiplies with routing weights,
permutes and sums: each a pass over tensors of top-k times the tokens, or more of them, forward and backward. Here, of
a row of D elements in and I in the middle, forward reads and writes

    gather      token -> row          2 D
    first       row -> gate, up       D + 2 I        (a product)
    gate        bias, gate            3 I
    second      -> row                I + D          (a product)
    sum         bias, weight, sum     D, and D a token

and backward gather 2 D, product I + D, gate 5 I, product 2 I + D, sum D. The gradient of a routing weight is
dy · (W h + b) = (W' dy) · h + dy · b, so backward needs neither the rows that were summed nor h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from .gates import OwnGate
from .passes import Gate, gather_rows, sum_rows
from .routes import Routes


@dataclass(frozen=True)
class Weights:
    """Of all E experts: D wide in and out, J after the first product, I after the gate.

    Attributes:
        first_EDJ, second_EID: their products.
        first_bias_EJ, second_bias_ED: what is added, if anything.
    """

    first_EDJ: Tensor
    second_EID: Tensor
    first_bias_EJ: Tensor | None = None
    second_bias_ED: Tensor | None = None


def run_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    routes: Routes,
    weights: Weights,
    gate: Gate | OwnGate,
    unread: bool = False,
    given: Tensor | None = None,
    take: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Of each token the sum of what its experts make of it, times `weights_TK`: [T, D] in the dtype of `x_TD`.

    Products are in the dtype of the experts' weights, sums in fp32.

    Args:
        unread: nobody reads the value, it is wanted for its graph: then it is not computed.
        given: what the first product gave for the same rows, [S, J]: then it is not computed.
        take: is given what it gave, which nobody writes to; not where it was given.
    """
    call = _Call(gate, routes, unread, torch.is_grad_enabled(), given, take)
    biases = weights.first_bias_EJ, weights.second_bias_ED
    result: Tensor = _Experts.apply(call, x_TD, weights_TK, weights.first_EDJ, weights.second_EID, *biases)
    return result


@dataclass(frozen=True)
class _Call:
    """What a call is beside its tensors; `has_graph`: whether something is kept for a backward pass."""

    gate: Gate | OwnGate
    routes: Routes
    unread: bool
    has_graph: bool
    given: Tensor | None
    take: Callable[[Tensor], None] | None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x_TD: Tensor,
        weights_TK: Tensor,
        first: Tensor,
        second: Tensor,
        first_bias: Tensor | None,
        second_bias: Tensor | None,
    ) -> Tensor:
        gate, routes = call.gate, call.routes
        gate_up_SJ = _first_product(call, x_TD, first) if call.given is None else call.given
        if call.has_graph:
            x_kept = x_TD if ctx.needs_input_grad[3] else None
            ctx.call, ctx.dtype = call, x_TD.dtype
            ctx.save_for_backward(x_kept, weights_TK, first, second, first_bias, second_bias, gate_up_SJ)
        if call.unread:
            return torch.empty_like(x_TD)
        hidden_SI = gate.forward(gate_up_SJ, first_bias, routes)
        del gate_up_SJ
        return sum_rows(_product(hidden_SI, second, routes), routes, x_TD.dtype, weights_TK, second_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, first, second, first_bias, second_bias, gate_up_SJ = ctx.saved_tensors
        gate, routes = ctx.call.gate, ctx.call.routes
        _, wants_x, wants_weights, wants_first, wants_second, wants_first_bias, wants_second_bias = (
            ctx.needs_input_grad
        )
        dx_TD, d_first, d_second, d_first_bias, d_second_bias = None, None, None, None, None
        weights_S = weights_TK.flatten()[routes.order_S]

        dy_SD, d_weights_S = gather_rows(dy_TD, routes, second.dtype, second_bias)
        d_hidden_SI = _product(dy_SD, second.transpose(-2, -1), routes)
        dy_kept: Any = dy_SD if wants_second or wants_second_bias else None
        del dy_SD
        d_gate_up_SJ, of_hidden_S = gate.backward(gate_up_SJ, first_bias, routes, d_hidden_SI, weights_S)
        del d_hidden_SI
        if wants_second:
            hidden_SI = gate.forward(gate_up_SJ, first_bias, routes, weights_S)
            d_second = _weight_gradient(hidden_SI, dy_kept, second, routes)
            del hidden_SI
        if wants_second_bias:
            d_second_bias = _by_expert(dy_kept, weights_S, second_bias, routes)
        del dy_kept

        if wants_first:
            rows_SD, _ = gather_rows(x_TD, routes, first.dtype, None)
            d_first = _weight_gradient(rows_SD, d_gate_up_SJ, first, routes)
            del rows_SD
        if wants_first_bias:
            d_first_bias = _by_expert(d_gate_up_SJ, torch.ones_like(weights_S), first_bias, routes)
        if wants_x:
            dx_TD = sum_rows(_product(d_gate_up_SJ, first.transpose(-2, -1), routes), routes, ctx.dtype)
        d_weights_TK = _by_token(d_weights_S + of_hidden_S, weights_TK, routes) if wants_weights else None
        return None, dx_TD, d_weights_TK, d_first, d_second, d_first_bias, d_second_bias


def _first_product(call: _Call, x_TD: Tensor, first: Tensor) -> Tensor:
    rows_SD, _ = gather_rows(x_TD, call.routes, first.dtype, None)
    gate_up_SJ = _product(rows_SD, first, call.routes)
    if call.take is not None:
        call.take(gate_up_SJ)
    return gate_up_SJ


def _by_token(values_S: Tensor, like_TK: Tensor, routes: Routes) -> Tensor:
    """Each row's value where its token has it; nothing of rows of no expert."""
    there_TK = routes.experts_TK < len(routes.offsets_E)
    return torch.where(there_TK, values_S[routes.places_TK], 0).to(like_TK.dtype)


def _product(rows_SA: Tensor, weights_EAB: Tensor, routes: Routes) -> Tensor:
    """Each row times the matrix of its expert, [S, B]; what stands in rows of no expert is not said."""
    if rows_SA.dtype != torch.float64:
        return grouped_mm(rows_SA, weights_EAB, offs=routes.offsets_E)
    products = rows_SA.new_zeros(len(rows_SA), weights_EAB.shape[2])  # there is no grouped product in float64
    for expert, rows in enumerate(_slices(routes)):
        products[rows] = rows_SA[rows] @ weights_EAB[expert]
    return products


def _weight_gradient(rows_SA: Tensor, d_rows_SB: Tensor, weights_EAB: Tensor, routes: Routes) -> Tensor:
    """[E, A, B], lying in memory as the weights do."""
    if weights_EAB.stride(-2) == 1 and weights_EAB.stride(-1) != 1:
        return _weight_gradient(d_rows_SB, rows_SA, weights_EAB.transpose(-2, -1), routes).transpose(-2, -1)
    if rows_SA.dtype != torch.float64:
        return grouped_mm(rows_SA.t(), d_rows_SB, offs=routes.offsets_E)
    return torch.stack([rows_SA[rows].t() @ d_rows_SB[rows] for rows in _slices(routes)])


def _slices(routes: Routes) -> list[slice]:
    ends = routes.offsets_E.tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _by_expert(rows_SD: Tensor, weights_S: Tensor, like_ED: Tensor, routes: Routes) -> Tensor:
    """Of each expert the sum of its rows times their weights: a product, whose sums are in fp32."""
    every = torch.arange(len(like_ED), device=rows_SD.device, dtype=routes.experts_S.dtype)
    shares_ES = (routes.experts_S == every[:, None]) * weights_S.to(rows_SD.dtype)
    rows_SD = rows_SD.masked_fill((routes.experts_S >= len(like_ED))[:, None], 0)  # what stands there may be NaN
    with torch.autocast(rows_SD.device.type, enabled=False):
        return (shares_ES @ rows_SD).to(like_ED.dtype)
