"""Liger's Triton kernels, where the package `liger-kernel` is installed: norms, gates and RoPE in one pass each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Liger:
    """The kernels, differentiable, on CUDA tensors."""

    _rms_norm: Callable[..., Any]
    _silu_mul: Callable[..., Any]
    _gelu_mul: Callable[..., Any]
    _rotary: Callable[..., Any]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Llama's RMSNorm of x [..., D]; a gradient that comes in is never overwritten, others may read it."""
        return self._rms_norm(x, weight, eps, 0.0, "llama", False)

    def rms_norm_from_zero(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Gemma's RMSNorm, times 1 + weight and rounded at last; a gradient that comes in is never overwritten."""
        return self._rms_norm(x, weight, eps, 1.0, "gemma", False)

    def wide_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The same with the weight multiplied before the result is narrowed, as gpt-oss does."""
        return self._rms_norm(x, weight, eps, 0.0, "gemma", False)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up. Backward leaves the gradients in `gate` and `up`, so nothing else may need their values."""
        return self._silu_mul(gate, up)

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same with GELU, approximated by tanh."""
        return self._gelu_mul(gate, up)

    def rotary(self, q_BNSH: Tensor, k_BGSH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the first `cos.shape[-1]` elements of each head; q and k may be overwritten.

        It computes in the dtype of cos and sin.
        """
        return self._rotary(q_BNSH, k_BGSH, cos, sin)


def why_not_liger() -> str | None:
    """Why Liger's kernels cannot be used on this machine's GPU; None: they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (pip install liger-kernel)" if missing else None


def load_liger() -> Liger | None:
    """The kernels; None where `why_not_liger` says why."""
    if why_not_liger() is not None:
        return None
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gates = LigerSiLUMulFunction.apply, LigerGELUMulFunction.apply
    return Liger(LigerRMSNormFunction.apply, *gates, LigerRopeFunction.apply)
