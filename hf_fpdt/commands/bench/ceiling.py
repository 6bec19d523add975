"""What the machine does at most: the rates of the attention kernel and of large matrix products, at given sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ...attention import AttentionSpec, select_kernel
from ...layout import Documents, seen_pairs
from ...model import training_of
from ...plan import ModelSizes, largest, windows_of
from ..measure import QueryRow, rate_of, row_rates
from ..options import corpus_of
from .figures import keys_of
from .job import Job
from .models import config_of

ROW_TOKENS = 32_768
# A GPU's clock falls as it warms, and steps take minutes.
SECONDS = MappingProxyType({"cuda": 2.0, "cpu": 0.05})


def measure_ceiling(job: Job) -> dict[str, Any]:
    """Operations a second: "matmul", and by the number of keys (as text, for JSON) those of attention both ways.

    Raises:
        NotImplementedError: no attention kernel serves.
    """
    config = config_of(job)
    sizes = training_of(config_of(job, most_layers=1), lora=False).model
    kinds = Counter(_kinds(config.get_text_config(), sizes))
    lengths = sorted({keys_of(n_tokens) for n_tokens in job.tokens})
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    kernels = dict.fromkeys(select_kernel("auto", device, dtype, kind).name for kind in kinds)
    rows = {keys: None if job.documents is None else corpus_of(job.documents).row(keys) for keys in lengths}
    attention = {str(keys): attention_rates(sizes, kinds, keys, device, dtype, rows[keys]) for keys in lengths}
    return {
        "kernel": ", ".join(kernels),
        "attention": attention,
        "matmul": matmul_rate(sizes, min(ROW_TOKENS, max(lengths)), device, dtype),
    }


def _kinds(text: Any, sizes: ModelSizes) -> Iterator[AttentionSpec]:
    """The attention of each layer of a text configuration."""
    softcap = largest(text, "attn_logit_softcapping")
    for window in windows_of(text):
        yield AttentionSpec(
            scale=sizes.head_dim**-0.5,
            head_dim=sizes.head_dim,
            value_dim=sizes.value_dim,
            window=window,
            softcap=softcap,
        )


def attention_rates(
    sizes: ModelSizes,
    kinds: Mapping[AttentionSpec, int],
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
    documents: Documents | None = None,
) -> tuple[float, float]:
    """Forward and backward over all layers of a sequence of so many keys, each kind measured by itself.

    A row has up to 32K queries, the last of `keys` keys, or of those that a window leaves.

    Args:
        kinds: how many layers have which attention.
        documents: of a packed row of so many tokens, whose last 32K queries are measured.
    """
    operations, forward_s, backward_s = 0.0, 0.0, 0.0
    for kind, layers in kinds.items():
        spec = kind if kind.window is not None and kind.window < keys else replace(kind, window=None)
        forward, backward = _kind_rates(sizes, spec, keys, device, dtype, documents)
        work = layers * sizes.attention_forward(seen_pairs(0, keys, spec.window, documents))
        operations, forward_s, backward_s = operations + work, forward_s + work / forward, backward_s + work / backward
    return operations / forward_s, operations / backward_s


def _kind_rates(
    sizes: ModelSizes,
    spec: AttentionSpec,
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
    documents: Documents | None,
) -> tuple[float, float]:
    """Where a kernel's causal masks are not aligned to the last key, every query sees every key; the rate is equal."""
    spec = replace(spec, packed=documents is not None)
    kernel = select_kernel("auto", device, dtype, spec)
    queries = min(keys, ROW_TOKENS)
    if documents is not None and kernel.packed_forward is not None:
        row = QueryRow(sizes.q_heads, sizes.kv_heads, spec, queries, keys, True, documents)
        return row_rates(kernel, row, device, dtype, SECONDS[device.type])
    if spec.window is not None:
        keys, causal = min(keys, queries + spec.window - 1), True
    else:
        causal = kernel.row_shape == "prefix"
    row = QueryRow(sizes.q_heads, sizes.kv_heads, spec, queries, keys, causal)
    return row_rates(kernel, row, device, dtype, SECONDS[device.type])


def matmul_rate(sizes: ModelSizes, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """The products of the MLP, up and down."""
    x = torch.randn(tokens, sizes.hidden, device=device, dtype=dtype)
    width = max(sizes.hidden, sizes.intermediate)
    up = torch.randn(sizes.hidden, width, device=device, dtype=dtype)
    down = torch.randn(width, sizes.hidden, device=device, dtype=dtype)
    return rate_of(4.0 * tokens * sizes.hidden * width, lambda: (x @ up) @ down, device, SECONDS[device.type])


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
