"""What the machine does at most: the rates of the attention kernel and of large matrix products, at given sizes."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from ...attention import AttentionSpec, select_kernel
from ...model import training_of
from ...plan import ModelSizes
from ..measure import QueryRow, rate_of, row_rates
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
    sizes = training_of(config_of(job, most_layers=1), lora=False).model
    lengths = sorted({keys_of(n_tokens) for n_tokens in job.tokens})
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    kernel = select_kernel("auto", device, dtype, AttentionSpec.plain(sizes.head_dim))
    attention = {str(keys): attention_rates(sizes, keys, device, dtype) for keys in lengths}
    return {
        "kernel": kernel.name,
        "attention": attention,
        "matmul": matmul_rate(sizes, min(ROW_TOKENS, max(lengths)), device, dtype),
    }


def attention_rates(sizes: ModelSizes, keys: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Forward and backward of a row of up to 32K queries, the last of `keys` keys.

    Where the kernel's causal masks are not aligned to the last key, every query sees every key; the rate is the same.
    """
    kernel = select_kernel("auto", device, dtype, AttentionSpec.plain(sizes.head_dim))
    queries, causal = min(keys, ROW_TOKENS), kernel.row_shape == "prefix"
    row = QueryRow(sizes.q_heads, sizes.kv_heads, sizes.head_dim, queries, keys, causal)
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
