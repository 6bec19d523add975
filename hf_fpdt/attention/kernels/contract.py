"""What an attention kernel is: one contract, and how it says why it cannot serve (paper section 4.2).

    forward(q_BSNH, k_BTGH, v_BTGH, *, causal, spec) -> out_BSNH, lse_BNS
    backward(dout_BSNH, q, k, v, out, lse_BNS, *, causal, spec) -> dq, dk, dv
    packed_forward, packed_backward(..., *, cuts, spec): the same of a batch of 1 whose queries and keys are those of
                                                         several documents, each causal, last query at last key
    why_not(device, dtype, spec) -> None where the kernel serves, else the reason it does not

B batch, S queries, T keys, N query heads, G key/value heads (G divides N), H head dimension. `lse` is fp32 (float64
for float64 inputs). `out` and `lse` given to `backward` are those of the whole row, merged over its calls; then the
gradients of the calls add up to the row's. With `causal` the last query is aligned with the last key. A kernel whose
`row_shape` is not "prefix" is only asked for causal with S = T, or with a window: then one call has all the keys that
a row's queries see. No call has a query that sees no key: kernels differ in the lse of such. What has no packed calls
is asked for one document at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...layout import RowShape
from ..spec import AttentionSpec

aten = torch.ops.aten
# Kernels index with 32 bits: one call may see at most this many elements of K (flash-attn issues 1841, 2611).
MAX_ELEMENTS = 2**31 - 1
NVIDIA_ALONE = "runs on NVIDIA GPUs alone"
Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
WhyNot = Callable[[torch.device, torch.dtype, AttentionSpec], "str | None"]


@dataclass(frozen=True, slots=True)
class Cuts:
    """The documents of one packed call, as flash-attention's interfaces ask for them.

    Attributes:
        queries: int32, where each begins among the queries, and the number of queries.
        keys: the same of the keys.
        most_queries, most_keys: of one document.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    def arguments(self) -> dict[str, Any]:
        """By the names that those interfaces have for them."""
        return {
            "cu_seqlens_q": self.queries,
            "cu_seqlens_k": self.keys,
            "max_seqlen_q": self.most_queries,
            "max_seqlen_k": self.most_keys,
        }

    @classmethod
    def of(cls, inner: Sequence[int], queries: tuple[int, int], keys: tuple[int, int], device: torch.device) -> Cuts:
        """Of queries and keys [start, stop) of a row, which end at one place, with documents that begin at `inner`."""
        edges = [[0, *(cut - start for cut in inner), stop - start] for start, stop in (queries, keys)]
        most = [max(right - left for left, right in zip(each[:-1], each[1:], strict=True)) for each in edges]
        of_queries, of_keys = (torch.tensor(each, dtype=torch.int32, device=device) for each in edges)
        return cls(of_queries, of_keys, most[0], most[1])


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One row of the table; see the module's docstring for its functions.

    Attributes:
        row_shape: how the kernel wants the keys of one query row, see `layout.RowShape`.
        row_tokens: queries a row should have when the caller has no reason of its own.
    """

    name: str
    forward: Forward
    backward: Backward
    why_not: WhyNot
    row_shape: RowShape
    row_tokens: int = 32_768
    packed_forward: Forward | None = None
    packed_backward: Backward | None = None


def why_not_kind(spec: AttentionSpec, *, windows: bool, softcaps: bool) -> str | None:
    """Why a kernel cannot serve attention that is more than causal; `windows` and `softcaps` say what it does."""
    if spec.window is not None and not windows:
        return f"does no sliding window ({spec.window})"
    if spec.softcap is not None and not softcaps:
        return f"does no softcap ({spec.softcap})"
    return None


def window_arguments(spec: AttentionSpec, causal: bool) -> dict[str, int]:
    """Keys to the left and to the right of its own that a query sees, as flash-attention's interfaces ask for them."""
    if spec.window is None or not causal:
        return {}
    return {"window_size_left": spec.window - 1, "window_size_right": 0}


def deterministic_argument() -> dict[str, bool]:
    """For kernels that have to be asked; PyTorch's own look for themselves."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def import_or_none(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def why_not_half_on_gpu(
    device: torch.device, dtype: torch.dtype, spec: AttentionSpec, *, least_sm: int, most_dim: int, on_rocm: str | None
) -> str | None:
    """Why a half-precision GPU kernel with these limits cannot serve.

    Args:
        on_rocm: why it cannot where "cuda" is an AMD GPU; None: it can.
    """
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if torch.version.hip is not None and on_rocm is not None:
        return f"{on_rocm} (this PyTorch is built for ROCm {torch.version.hip})"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    wrong = [dim for dim in (spec.head_dim, spec.value_dim) if dim % 8 or dim > most_dim]
    if wrong:
        return f"takes a head_dim that is a multiple of 8 and at most {most_dim}, not {wrong[0]}"
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < least_sm:
        return f"needs compute capability {least_sm / 10}, this GPU has {major}.{minor}"
    return None
