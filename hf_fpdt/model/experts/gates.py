"""Which gate experts have, asked of the module itself: no name of an architecture, nor of an attribute of one.

A module's own gate is called in float64 at a few points that give away the numbers of a `Gate`; then both are compared
at many more. One that computes something else stays the module's own code, `OwnGate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...numerics import accumulation_dtype
from .passes import Gate, with_bias
from .routes import Routes

FAR, POINTS, DIGITS, TOLERANCE = 1e6, 4096, 12, 1e-12
CPU = "cpu"  # named, because a user may have made another device the default


@dataclass(frozen=True)
class OwnGate:
    """The module's own gate: a function of [S, J], each row by itself, that gives [S, I]."""

    function: Callable[[Tensor], Tensor]

    def forward(
        self, gate_up_SJ: Tensor, bias_EJ: Tensor | None, routes: Routes, weights_S: Tensor | None = None
    ) -> Tensor:
        """As `Gate.forward`, in as many passes as the function makes."""
        hidden_SI = self.function(with_bias(gate_up_SJ, bias_EJ, routes, gate_up_SJ.dtype))
        return (hidden_SI if weights_S is None else hidden_SI * weights_S[:, None]).to(gate_up_SJ.dtype)

    def backward(
        self,
        gate_up_SJ: Tensor,
        bias_EJ: Tensor | None,
        routes: Routes,
        d_hidden_SI: Tensor,
        weights_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `Gate.backward`."""
        with torch.enable_grad():
            rows = with_bias(gate_up_SJ.detach(), bias_EJ, routes, gate_up_SJ.dtype).requires_grad_()
            hidden_SI = self.function(rows)
        d_weighted = (d_hidden_SI * weights_S[:, None]).to(hidden_SI.dtype)
        (d_rows,) = torch.autograd.grad([hidden_SI], [rows], [d_weighted])
        wide = accumulation_dtype(hidden_SI.dtype)
        return d_rows, (d_hidden_SI.to(wide) * hidden_SI.detach()).sum(-1)


def gate_of(experts: Any) -> Gate | OwnGate:
    """The gate of a module of experts, whose numbers are as they are now."""
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    if not experts.has_gate or any(True for _ in experts.buffers()):  # what is in a buffer may change unseen
        return OwnGate(function)
    interleaved = not getattr(experts, "is_concatenated", True)
    device = next(experts.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        found = _fitted(function, interleaved, device)
    return OwnGate(function) if found is None else found


def _fitted(function: Callable[[Tensor], Tensor], interleaved: bool, device: torch.device) -> Gate | None:
    """The gate that gives what the function does, at every point tried."""

    def of(gate: Tensor, up: Tensor) -> Tensor:
        rows = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        return function(rows.to(device)).cpu()

    gates, ups = (torch.tensor([[*values]], dtype=torch.float64, device=CPU) for values in zip(*_PROBES, strict=True))
    try:
        at_zero, at_one, highest, lowest, far = of(gates, ups)[0].tolist()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # it wants more than rows in float64
    slope = at_one - at_zero
    if not 0 < slope < 1:
        return None
    alpha = _rounded(torch.tensor(slope, dtype=torch.float64, device=CPU).logit().item())
    shift = _rounded(at_zero / slope)
    if shift == -1:
        return None
    found = Gate(
        alpha,
        shift,
        _gate_max(far / (1 + shift), alpha),
        _limit(lowest / slope - shift),
        _limit(highest / slope - shift),
        interleaved,
    )
    return found if _agrees(found, of) else None


# Points (gate, up): two of a slope in up, which is sigmoid(alpha); up's limits; the gate's.
_PROBES = ((1.0, 0.0), (1.0, 1.0), (1.0, FAR), (1.0, -FAR), (FAR, 1.0))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _limit(value: float) -> float:
    """A limit of up that was found far out; none, where it went as far."""
    return _rounded(value) if abs(value) < FAR / 2 else float("inf" if value > 0 else "-inf")


def _gate_max(highest: float, alpha: float) -> float:
    """Where the gate stops growing, from g · sigmoid(alpha · g) there."""
    if not abs(highest) < FAR / 2:
        return float("inf")
    value = torch.tensor(highest, dtype=torch.float64, device=CPU)
    for _ in range(100):
        value = highest / (alpha * value).sigmoid()
    return _rounded(value.item())


def _agrees(found: Gate, of: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether both give the same at random points near and far, and at the limits."""
    generator = torch.Generator(CPU).manual_seed(0)
    size = 10 ** torch.empty(2, POINTS, dtype=torch.float64, device=CPU).uniform_(-4, 4, generator=generator)
    gate, up = size * torch.randn(2, POINTS, dtype=torch.float64, device=CPU, generator=generator).sign()
    ends = [end for end in (found.gate_max, found.up_min, found.up_max) if abs(end) < FAR]
    near = torch.linspace(-1, 1, 9, dtype=torch.float64, device=CPU)
    for end in ends:
        gate, up = torch.cat((gate, end + near)), torch.cat((up, end - near))
    rows = torch.stack((gate, up), -1).flatten(-2) if found.interleaved else torch.cat((gate, up))
    routes = Routes.of(torch.zeros(1, 1, dtype=torch.int64, device=CPU), 1)
    expected, ours = of(gate[None], up[None])[0], found.forward(rows[None], None, routes)[0]
    return bool(((ours - expected).abs() <= TOLERANCE * (gate.abs() + 1) * (up.abs() + 1)).all())
