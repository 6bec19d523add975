"""The table of attention kernels: one is chosen for a call, and never replaced in silence."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from types import MappingProxyType

import torch

from ..spec import AttentionSpec
from .contract import Kernel
from .cpu import CPU
from .cudnn import CUDNN
from .efficient import EFFICIENT
from .flash import FLASH
from .flash_attn_2 import FLASH_ATTN_2
from .flash_attn_3 import FLASH_ATTN_3
from .flash_attn_4 import FLASH_ATTN_4
from .math import MATH

logger = logging.getLogger(__name__)


def select_kernel(name: str, device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> Kernel:
    """The kernel called `name`, or with "auto" the first of the table that serves; logged once for each case.

    Raises:
        ValueError: `name` is not in the table.
        NotImplementedError: the named kernel, or every kernel, cannot serve; the reasons are in the message.
    """
    return _select(name, device.type, dtype, spec, torch.are_deterministic_algorithms_enabled())


@functools.lru_cache
def _select(name: str, device_type: str, dtype: torch.dtype, spec: AttentionSpec, deterministic: bool) -> Kernel:
    device = torch.device(device_type)
    case = f"{device_type}, {dtype}, {spec}{', deterministic' if deterministic else ''}"
    if name != "auto" and name not in KERNELS:
        raise ValueError(f'hf_fpdt: kernel={name!r} is not known; "auto" or one of {", ".join(KERNELS)} is expected.')
    reasons: list[str] = []
    for kernel in _by_preference(spec) if name == "auto" else (KERNELS[name],):
        reason = kernel.why_not(device, dtype, spec)
        if reason is None:
            logger.info("hf_fpdt: attention kernel %r for %s%s", kernel.name, case, _passed_over(reasons))
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(
        f"hf_fpdt: kernel={name!r} cannot serve {case}: {'; '.join(reasons)}. Convert the model's dtype, or take "
        f'kernel="auto" or one that can: {", ".join(_serving(device, dtype, spec))}.'
    )


def why_not_served(name: str, cases: Iterable[tuple[torch.device, torch.dtype]], spec: AttentionSpec) -> str | None:
    """Why the kernel called `name` serves attention of this kind in none of the cases; None where it does in one.

    Args:
        cases: where it may run, and in which dtype; the first is the likeliest, and the reason is of it.
    """
    cases = list(cases)
    if name == "auto" or any(KERNELS[name].why_not(*case, spec) is None for case in cases):
        return None
    able = dict.fromkeys(other for case in cases for other in _serving(*case, spec))
    return (
        f"kernel={name!r} {KERNELS[name].why_not(*cases[0], spec)}, and attention of {spec} is asked for; take "
        f'kernel="auto" or one that can: {", ".join(able)}'
    )


def _serving(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> list[str]:
    return [kernel.name for kernel in KERNELS.values() if kernel.why_not(device, dtype, spec) is None]


def _by_preference(spec: AttentionSpec) -> list[Kernel]:
    """Packed rows first ask the kernels that do their documents in one call: others do them one by one."""
    return sorted(KERNELS.values(), key=lambda kernel: spec.packed and kernel.packed_forward is None)


def _passed_over(reasons: list[str]) -> str:
    return f" (passed over: {'; '.join(reasons)})" if reasons else ""


# "auto" takes the first that serves.
_TABLE = (FLASH_ATTN_4, FLASH_ATTN_3, CUDNN, FLASH_ATTN_2, FLASH, EFFICIENT, CPU, MATH)
KERNELS = MappingProxyType({kernel.name: kernel for kernel in _TABLE})
