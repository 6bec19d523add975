"""Passes over rows of experts that read and write each element once: Triton's on a GPU, PyTorch's elsewhere.

Sums are taken in fp32 (float64 for float64). See `Routes` for the letters; D is the width of a row.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics import accumulation_dtype
from .routes import Routes


def gather_rows(x_TD: Tensor, routes: Routes, dtype: torch.dtype, bias_ED: Tensor | None) -> tuple[Tensor, Tensor]:
    """(each row's token [S, D] in `dtype`, its product with the bias of the row's expert [S] or 0)."""
    if _has_kernels(x_TD):
        from .passes_triton import gather

        return gather(x_TD, routes, dtype, bias_ED)
    rows_SD, wide = x_TD[routes.tokens_S], accumulation_dtype(dtype)
    if bias_ED is None:
        return rows_SD.to(dtype), rows_SD.new_zeros(len(rows_SD), dtype=wide)
    return rows_SD.to(dtype), (rows_SD.to(wide) * of_rows(bias_ED, routes).to(wide)).sum(-1)


def sum_rows(
    rows_SD: Tensor,
    routes: Routes,
    dtype: torch.dtype,
    weights_TK: Tensor | None = None,
    bias_ED: Tensor | None = None,
) -> Tensor:
    """Of each token the sum of its rows [T, D] in `dtype`, with their experts' bias and times their weights."""
    if _has_kernels(rows_SD):
        from .passes_triton import combine

        return combine(rows_SD, routes, dtype, weights_TK, bias_ED)
    wide = accumulation_dtype(rows_SD.dtype)
    rows_TKD = rows_SD[routes.places_TK].to(wide)
    if bias_ED is not None:
        rows_TKD = rows_TKD + bias_ED[routes.experts_TK.clamp(max=len(bias_ED) - 1)].to(wide)
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK[..., None].to(wide)
    there_TK = routes.experts_TK < len(routes.offsets_E)
    return torch.where(there_TK[..., None], rows_TKD, 0).sum(1).to(dtype)


@dataclass(frozen=True)
class Gate:
    """(clamp(up) + shift) · g · sigmoid(alpha · g), with g = min(gate, gate_max): SwiGLU, and gpt-oss's.

    Attributes:
        interleaved: gate and up lie in turns, [gate, up, gate, up, …]; else one half after the other.
    """

    alpha: float
    shift: float
    gate_max: float
    up_min: float
    up_max: float
    interleaved: bool

    def forward(
        self, gate_up_SJ: Tensor, bias_EJ: Tensor | None, routes: Routes, weights_S: Tensor | None = None
    ) -> Tensor:
        """[S, J / 2] in the dtype of the rows, times the weights; the bias is added first."""
        if _has_kernels(gate_up_SJ):
            from .passes_triton import gate_forward

            return gate_forward(self._numbers, self.interleaved, gate_up_SJ, bias_EJ, routes, weights_S)
        gate, up = self._halves(with_bias(gate_up_SJ, bias_EJ, routes, accumulation_dtype(gate_up_SJ.dtype)))
        gate = gate.clamp(max=self.gate_max)
        up = up.clamp(self.up_min, self.up_max) + self.shift
        hidden_SI = up * gate * (self.alpha * gate).sigmoid()
        return (hidden_SI if weights_S is None else hidden_SI * weights_S[:, None]).to(gate_up_SJ.dtype)

    def backward(
        self,
        gate_up_SJ: Tensor,
        bias_EJ: Tensor | None,
        routes: Routes,
        d_hidden_SI: Tensor,
        weights_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the rows, gradient of `weights_S` in fp32).

        Args:
            d_hidden_SI: gradient of what `forward` gives with the weights, not yet multiplied with them.
        """
        if _has_kernels(gate_up_SJ):
            from .passes_triton import gate_backward

            return gate_backward(self._numbers, self.interleaved, gate_up_SJ, bias_EJ, routes, d_hidden_SI, weights_S)
        dtype = gate_up_SJ.dtype
        raw_gate, raw_up = self._halves(with_bias(gate_up_SJ, bias_EJ, routes, accumulation_dtype(gate_up_SJ.dtype)))
        gate = raw_gate.clamp(max=self.gate_max)
        up = raw_up.clamp(self.up_min, self.up_max) + self.shift
        sigmoid = (self.alpha * gate).sigmoid()
        hidden, weights = up * gate * sigmoid, weights_S[:, None].to(gate.dtype)
        wide = d_hidden_SI.to(gate.dtype)
        d_weights_S = (wide * hidden).sum(-1)
        d_hidden = wide * weights
        d_gate = d_hidden * up * sigmoid * (1 + self.alpha * gate * (1 - sigmoid))
        d_gate = d_gate.masked_fill(raw_gate > self.gate_max, 0)
        d_up = (d_hidden * gate * sigmoid).masked_fill((raw_up < self.up_min) | (raw_up > self.up_max), 0)
        together = torch.stack((d_gate, d_up), -1).flatten(-2) if self.interleaved else torch.cat((d_gate, d_up), -1)
        return together.to(dtype), d_weights_S

    @property
    def _numbers(self) -> tuple[float, ...]:
        return self.alpha, self.shift, self.gate_max, self.up_min, self.up_max

    def _halves(self, gate_up_SJ: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return gate_up_SJ[:, ::2], gate_up_SJ[:, 1::2]
        half = gate_up_SJ.shape[1] // 2
        return gate_up_SJ[:, :half], gate_up_SJ[:, half:]


def with_bias(rows_SD: Tensor, bias_ED: Tensor | None, routes: Routes, dtype: torch.dtype) -> Tensor:
    """Each row with the bias of its expert, in `dtype`."""
    wide = rows_SD.to(dtype)
    return wide if bias_ED is None else wide + of_rows(bias_ED, routes).to(dtype)


def of_rows(values_ED: Tensor, routes: Routes) -> Tensor:
    """Of each row the value of its expert."""
    return values_ED[routes.experts_S.clamp(max=len(values_ED) - 1)]


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
