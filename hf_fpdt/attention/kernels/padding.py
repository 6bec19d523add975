"""Values of another width than keys, for kernels that want both alike: zeros are added, and taken off again.

Exact: a zero adds nothing to a score, and the columns of the output and of dV that belong to added zeros are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..spec import AttentionSpec
from .contract import Backward, Forward


def with_one_width(
    forward: Forward, backward: Backward, takes_two: Callable[[AttentionSpec], bool] = lambda spec: False
) -> tuple[Forward, Backward]:
    """Two functions of a kernel that takes heads of one width, made to take two widths; packed calls or others.

    Args:
        takes_two: whether the kernel needs no help.
    """

    @functools.wraps(forward)
    def padded_forward(q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, **kind: Any) -> tuple[Tensor, Tensor]:
        if spec.head_dim == spec.value_dim or takes_two(spec):
            return forward(q, k, v, spec=spec, **kind)
        q, k, v = (_widened(x, spec) for x in (q, k, v))
        out, lse = forward(q, k, v, spec=spec, **kind)
        return out[..., : spec.value_dim], lse

    @functools.wraps(backward)
    def padded_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, spec: AttentionSpec, **kind: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if spec.head_dim == spec.value_dim or takes_two(spec):
            return backward(dout, q, k, v, out, lse, spec=spec, **kind)
        dout, q, k, v, out = (_widened(x, spec) for x in (dout, q, k, v, out))
        dq, dk, dv = backward(dout, q, k, v, out, lse, spec=spec, **kind)
        return dq[..., : spec.head_dim], dk[..., : spec.head_dim], dv[..., : spec.value_dim]

    return padded_forward, padded_backward


def _widened(x: Tensor, spec: AttentionSpec) -> Tensor:
    missing = max(spec.head_dim, spec.value_dim) - x.shape[-1]
    return functional.pad(x, (0, missing)) if missing else x
