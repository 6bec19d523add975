"""What this machine's GPU does in a second, measured in a few seconds: the rates that `hf-fpdt plan` reckons with.

The same quantities as in the table of `rates`, so one can stand for the other: large matrix products, the attention
kernel that "auto" takes, device memory, and the link to pinned host memory. Links between GPUs are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from ..attention import AttentionSpec, Kernel, call_backward, call_forward, select_kernel
from ..forecast import GPU, HEAD_DIMS, gpu_named
from ..layout import Documents, Span, first_key, seen_pairs
from ..memory import PinnedMemory, Transfers, device_bytes_available
from ..plan import BACKWARD_OPERATIONS
from ..units import GIB

Q_HEADS, KV_HEADS = 32, 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of what is run. The defaults fill a GPU and fit one of 8 GiB.

    Attributes:
        matrix: rows and columns of square matrices.
        tokens: queries and keys of attention, at most what the kernel likes in a row.
        copied_bytes: of a copy inside the device, and of one over the link.
        seconds: about how long each thing is repeated.
    """

    matrix: int = 8192
    tokens: int = 16_384
    copied_bytes: int = GIB
    seconds: float = 0.5


def measured(device: torch.device, dtype: torch.dtype, *, sizes: Sizes | None = None, name: str, note: str) -> GPU:
    """Rates of `device` for `dtype`.

    Args:
        name: of the GPU, as its driver says it. Where it is known, MFU is measured against its data sheet, from which
            links to other GPUs come too; else against its own matrix products, and other GPUs are as far as the host.
        note: date and versions, for whoever reads the file.
    """
    sizes = Sizes() if sizes is None else sizes
    memory = device_bytes_available(device) if device.type == "cuda" else GIB
    matmul, link, kind = _matmul_rate(device, dtype, sizes), min(link_rates(device, sizes)), gpu_named(name)
    return GPU(
        name=name,
        memory_gib=memory / GIB,
        peak=matmul if kind is None else kind.peak,
        matmul=matmul,
        attention=MappingProxyType({dim: attention_rates(device, dtype, dim, sizes) for dim in HEAD_DIMS}),
        memory=_memory_rate(device, sizes),
        link=link,
        peers=link if kind is None else kind.peers,
        network=link if kind is None else kind.network,
        source=f"rates measured on this {name}, {note}{'' if kind else '; MFU against its own matrix products'}",
    )


def rate_of(amount: float, run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """`amount` a second of calls of `run`, repeated for about `seconds` after two that do not count.

    Args:
        amount: of whatever is counted, in one call.
    """
    run()
    began = _now(device)
    run()
    calls = max(1, int(seconds / max(_now(device) - began, 1e-6)))
    began = _now(device)
    for _ in range(calls):
        run()
    return calls * amount / max(_now(device) - began, 1e-9)


def _now(device: torch.device) -> float:
    """Seconds, everything that was asked of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _matmul_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).to(dtype) for _ in range(2))
    return rate_of(2 * sizes.matrix**3, lambda: a @ b, device, sizes.seconds)


def attention_rates(device: torch.device, dtype: torch.dtype, head_dim: int, sizes: Sizes) -> tuple[float, float]:
    """Operations a second forward and backward of the kernel that "auto" takes, on a full square of grouped heads."""
    spec = AttentionSpec.plain(head_dim)
    kernel = select_kernel("auto", device, dtype, spec)
    n = min(sizes.tokens, kernel.row_tokens)
    return row_rates(kernel, QueryRow(Q_HEADS, KV_HEADS, spec, n, n, causal=False), device, dtype, sizes.seconds)


@dataclass(frozen=True)
class QueryRow:
    """Queries, and the keys that they read in one call; with `causal` the last query is aligned with the last key.

    Attributes:
        documents: of a packed row of `keys` tokens; the kernel is then asked for the documents that queries are of.
    """

    q_heads: int
    kv_heads: int
    spec: AttentionSpec
    queries: int
    keys: int
    causal: bool
    documents: Documents | None = None

    @property
    def span(self) -> Span:
        """The keys that the queries see, and where documents begin among them."""
        start = self.keys - self.queries
        cuts = () if self.documents is None else self.documents.inside(start, self.keys)
        first = 0 if self.documents is None else first_key(start, self.spec.window, self.documents)
        return Span(first, self.keys, self.causal, cuts)

    @property
    def operations(self) -> float:
        """Of its forward pass, of the pairs that are seen."""
        pairs = float(self.queries * self.keys)
        if self.causal:
            pairs = seen_pairs(self.keys - self.queries, self.keys, self.spec.window, self.documents)
        return 2.0 * pairs * self.q_heads * (self.spec.head_dim + self.spec.value_dim)


def row_rates(
    kernel: Kernel, row: QueryRow, device: torch.device, dtype: torch.dtype, seconds: float
) -> tuple[float, float]:
    """Operations a second forward and backward of one call on random tensors."""

    def normal(tokens: int, heads: int, width: int) -> Tensor:
        return torch.randn(1, tokens, heads, width, device=device, dtype=dtype)

    spec, span = row.spec, row.span
    q, dout = (normal(row.queries, row.q_heads, width) for width in (spec.head_dim, spec.value_dim))
    k, v = (normal(span.stop - span.start, row.kv_heads, width) for width in (spec.head_dim, spec.value_dim))
    spec = replace(spec, grouped=row.q_heads != row.kv_heads)
    out, lse = call_forward(kernel, q, k, v, span, spec)
    forward = rate_of(row.operations, lambda: call_forward(kernel, q, k, v, span, spec), device, seconds)
    again = BACKWARD_OPERATIONS * row.operations
    backward = partial(call_backward, kernel, dout, q, k, v, out, lse, span=span, spec=spec)
    return forward, rate_of(again, backward, device, seconds)


def _memory_rate(device: torch.device, sizes: Sizes) -> float:
    source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate_of(2 * sizes.copied_bytes, lambda: target.copy_(source), device, sizes.seconds)


def link_rates(device: torch.device, sizes: Sizes | None = None) -> tuple[float, float]:
    """Bytes a second from pinned host memory to the device, and back; one way at a time."""
    sizes = Sizes() if sizes is None else sizes
    pinned, moves = PinnedMemory(device), Transfers(device)
    buffer = pinned.buffer(sizes.copied_bytes)
    on_device = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device)

    def fetch() -> None:
        moves.to_device(buffer, on_device.shape, on_device.dtype, None).tensor()

    def send() -> None:
        moves.to_host(on_device, buffer).settle()

    try:
        rates = tuple(rate_of(sizes.copied_bytes, move, device, sizes.seconds) for move in (fetch, send))
    finally:
        pinned.release()
    return rates[0], rates[1]
