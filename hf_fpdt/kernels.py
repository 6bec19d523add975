"""The table of attention kernels: one contract, chosen once, never downgraded in silence (paper section 4.2).

    forward(q_BSNH, k_BTGH, v_BTGH, *, causal, scale) -> out_BSNH, lse_BNS
    backward(dout_BSNH, q, k, v, out, lse_BNS, *, causal, scale) -> dq, dk, dv
    why_not(device, dtype, head_dim) -> None where the kernel serves, else the reason it does not

B batch, S queries, T keys, N query heads, G key/value heads (G divides N), H head dimension. `lse` is fp32 (float64
for float64 inputs). `out` and `lse` given to `backward` are those of the whole row, merged over its calls; then the
gradients of the calls add up to the row's. With `causal` the last query is aligned with the last key; a kernel whose
`row_shape` is not "prefix" is only asked for causal with S = T.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, ModuleType, SimpleNamespace

import torch
from torch import Tensor

from .layout import RowShape

logger = logging.getLogger(__name__)
aten = torch.ops.aten

# Kernels index with 32 bits: one call may see at most this many elements of K (flash-attn issues 1841, 2611).
MAX_ELEMENTS = 2**31 - 1
NVIDIA_ALONE = "runs on NVIDIA GPUs alone"

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
WhyNot = Callable[[torch.device, torch.dtype, int], "str | None"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One row of the table; see the module's docstring for the three functions.

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


def select_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel called `name`, or with "auto" the first of the table that serves; logged once for each case.

    Raises:
        ValueError: `name` is not in the table.
        NotImplementedError: the named kernel, or every kernel, cannot serve; the reasons are in the message.
    """
    return _select(name, device.type, dtype, head_dim, torch.are_deterministic_algorithms_enabled())


@functools.lru_cache
def _select(name: str, device_type: str, dtype: torch.dtype, head_dim: int, deterministic: bool) -> Kernel:
    device = torch.device(device_type)
    case = f"{device_type}, {dtype}, head_dim {head_dim}{', deterministic' if deterministic else ''}"
    if name != "auto" and name not in KERNELS:
        raise ValueError(f'kernel={name!r} is not known; "auto" or one of {", ".join(KERNELS)} is expected.')
    reasons: list[str] = []
    for kernel in KERNELS.values() if name == "auto" else (KERNELS[name],):
        reason = kernel.why_not(device, dtype, head_dim)
        if reason is None:
            logger.info("hf_fpdt: attention kernel %r for %s%s", kernel.name, case, _passed_over(reasons))
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(
        f"kernel={name!r} cannot serve {case}: {'; '.join(reasons)}. Convert the model's dtype, install a kernel, or "
        'take kernel="auto".'
    )


def _passed_over(reasons: list[str]) -> str:
    return f" (passed over: {'; '.join(reasons)})" if reasons else ""


def _deterministic() -> dict[str, bool]:
    """For kernels that have to be asked; PyTorch's own look for themselves."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _half_on_gpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, least_sm: int, most_dim: int, on_rocm: str | None
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
    if head_dim % 8 or head_dim > most_dim:
        return f"takes a head_dim that is a multiple of 8 and at most {most_dim}, not {head_dim}"
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < least_sm:
        return f"needs compute capability {least_sm / 10}, this GPU has {major}.{minor}"
    return None


# -- math: plain PyTorch, any device and dtype; the twin the others are checked against -------------------------------


def _math_scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q as [B, S, G, R, H], k, and masked scores [B, G, R, S, T], all in at least fp32; R = N / G."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BSGRH = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bsgrh,btgh->bgrst", q_BSGRH, k.to(dtype)) * scale
    if causal:
        s, t = scores.shape[-2:]
        scores.masked_fill_(torch.ones(s, t, dtype=torch.bool, device=q.device).triu_(t - s + 1), -math.inf)
    return q_BSGRH, k.to(dtype), scores


def _math_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        _, _, scores = _math_scores(q, k, causal, scale)
        lse_BGRS = scores.logsumexp(-1)
        out = torch.einsum("bgrst,btgh->bsgrh", scores.softmax(-1), v.to(scores.dtype))
    return out.flatten(2, 3).to(q.dtype), lse_BGRS.flatten(1, 2)


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        q_BSGRH, k_, scores = _math_scores(q, k, causal, scale)
        groups = (k.shape[2], -1)
        p = scores.sub_(lse.unflatten(1, groups).unsqueeze(-1)).exp_()
        do = dout.to(p.dtype).unflatten(2, groups)
        delta_BGRS = (do * out.to(p.dtype).unflatten(2, groups)).sum(-1).permute(0, 2, 3, 1)
        dv = torch.einsum("bgrst,bsgrh->btgh", p, do)
        dp = torch.einsum("bsgrh,btgh->bgrst", do, v.to(p.dtype))
        ds = dp.sub_(delta_BGRS.unsqueeze(-1)).mul_(p).mul_(scale)
        dq = torch.einsum("bgrst,btgh->bsgrh", ds, k_).flatten(2, 3)
        dk = torch.einsum("bgrst,bsgrh->btgh", ds, q_BSGRH)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _math_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


# -- cpu: PyTorch's flash attention for the CPU; causal is top-left aligned -------------------------------------------


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _cpu_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    served = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if dtype in served else f"takes {', '.join(map(str, served))}, not {dtype}"


# -- flash: FlashAttention-2 as PyTorch ships it; causal is bottom-right aligned --------------------------------------


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    lengths = (q.shape[1], k.shape[1])
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, *lengths, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (q.shape[1], k.shape[1])
    no_rng = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, *lengths, 0.0, causal, *no_rng, scale=scale
    )
    return dq, dk, dv


def _flash_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    # PyTorch runs AOTriton there: a row would read the keys of an earlier one, and nothing would say so.
    on_rocm = "aligns the causal mask with the first key on AMD GPUs, not with the last; install flash-attn"
    return _half_on_gpu(device, dtype, head_dim, least_sm=80, most_dim=256, on_rocm=on_rocm)


# -- cudnn: builds a plan for each shape, so it is asked for few (pairs); causal is top-left aligned ------------------


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = (q.shape[2], k.shape[2])
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.unsqueeze(-1),
        no_rng,
        no_rng,
        None,
        None,
        None,
        *lengths,
        0.0,
        causal,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _cudnn_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    # torch.backends.cudnn is there on ROCm too, and means MIOpen.
    if device.type == "cuda" and torch.version.hip is None and not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic, and deterministic algorithms are asked for"
    return _half_on_gpu(device, dtype, head_dim, least_sm=90, most_dim=128, on_rocm=NVIDIA_ALONE)


# -- fa4: flash-attn-4 (CuTe DSL); causal is bottom-right aligned -----------------------------------------------------


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    out, lse, *_ = fa4._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out, lse


def _fa4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    fa4 = importlib.import_module("flash_attn.cute.interface")
    grads = fa4._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, **_deterministic())
    dq, dk, dv = grads[:3]
    return dq, dk, dv


def _fa4_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = _half_on_gpu(device, dtype, head_dim, least_sm=90, most_dim=128, on_rocm=NVIDIA_ALONE)
    if reason is None and _import("flash_attn.cute.interface") is None:
        return "the package flash-attn-4 is not installed (pip install flash-attn-4)"
    return reason


# -- flash-attn-2 and flash-attn-3: the packages of those names; causal is bottom-right aligned -----------------------


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = fa2._flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
    return out, lse


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    fa2 = importlib.import_module("flash_attn.flash_attn_interface")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    fa2._flash_attn_backward(
        *(dout.contiguous(), q, k, v, out, lse, dq, dk, dv, 0.0, scale, causal, -1, -1, 0.0, None),
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _fa2_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = _half_on_gpu(device, dtype, head_dim, least_sm=80, most_dim=256, on_rocm=None)
    if reason is not None:
        return reason
    interface = _import("flash_attn.flash_attn_interface")
    if interface is None:
        return "the package flash-attn (2.7 or later) is not installed"
    version = getattr(_import("flash_attn"), "__version__", "0.0").split(".")
    return None if (int(version[0]), int(version[1])) >= (2, 7) else "the package flash-attn is older than 2.7"


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal)
    return out, lse


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    fa3 = importlib.import_module("flash_attn_interface")
    grads = SimpleNamespace(dq=torch.empty_like(q), dk=torch.empty_like(k), dv=torch.empty_like(v))
    fa3._flash_attn_backward(
        dout.contiguous(), q, k, v, out, lse, **vars(grads), softmax_scale=scale, is_causal=causal, **_deterministic()
    )
    return grads.dq, grads.dk, grads.dv


def _fa3_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = _half_on_gpu(device, dtype, head_dim, least_sm=90, most_dim=256, on_rocm=NVIDIA_ALONE)
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        return "is built for Hopper GPUs alone"
    if reason is None and _import("flash_attn_interface") is None:
        return "the package flash-attn 3 (flash_attn_interface) is not installed"
    return reason


# "auto" takes the first that serves.
_TABLE = (
    Kernel(name="fa4", forward=_fa4_forward, backward=_fa4_backward, why_not=_fa4_why_not, row_shape="prefix"),
    Kernel(
        name="flash-attn-3",
        forward=_fa3_forward,
        backward=_fa3_backward,
        why_not=_fa3_why_not,
        row_shape="prefix",
    ),
    Kernel(
        name="cudnn",
        forward=_cudnn_forward,
        backward=_cudnn_backward,
        why_not=_cudnn_why_not,
        row_shape="pair",
    ),
    Kernel(
        name="flash-attn-2",
        forward=_fa2_forward,
        backward=_fa2_backward,
        why_not=_fa2_why_not,
        row_shape="prefix",
    ),
    Kernel(
        name="flash",
        forward=_flash_forward,
        backward=_flash_backward,
        why_not=_flash_why_not,
        row_shape="prefix",
    ),
    Kernel(
        name="cpu",
        forward=_cpu_forward,
        backward=_cpu_backward,
        why_not=_cpu_why_not,
        row_shape="rectangle",
        row_tokens=4096,
    ),
    Kernel(
        name="math",
        forward=_math_forward,
        backward=_math_backward,
        why_not=_math_why_not,
        row_shape="pair",
        row_tokens=1024,
    ),
)
KERNELS = MappingProxyType({kernel.name: kernel for kernel in _TABLE})
