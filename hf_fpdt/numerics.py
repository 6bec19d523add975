"""Dtypes of sums."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype in which gradients of `dtype` add up over chunks: fp32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
