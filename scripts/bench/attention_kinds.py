"""What each attention kernel of this GPU makes of windows, softcap, sinks and head widths: right or not, and how fast.

    python scripts/bench/attention_kinds.py [--out FILE.csv] [--tokens 32768] [--seconds 0.3] [--only cudnn ...]

Right: a row of 512 queries at the end of 1,280 keys, grouped heads where the widths are alike, bfloat16, beside
float64; errors may be at most twice those of plain PyTorch in bfloat16. Fast: one chunk of queries over a chunk of
keys (full), or over the keys that a window leaves; operations are those of the pairs seen. Sinks are merged into the
row, so they cost the kernel nothing: they are checked, and not timed. A kernel that cannot serve is listed with its
reason.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from hf_fpdt.attention import AttentionSpec, Kernel, attention, forward_row, sinks_gradient
from hf_fpdt.attention.kernels.cudnn import CUDNN, _cudnn_backward, _cudnn_forward
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.commands.measure import rate_of
from hf_fpdt.layout import Span, first_key, seen_pairs
from hf_fpdt.plan import BACKWARD_OPERATIONS

# Query heads, key heads, width of keys, width of values.
HEADS = ((64, 8, 64, 64), (32, 8, 128, 128), (16, 16, 192, 128), (16, 8, 256, 256))
WINDOWS = (None, 128, 1024, 4096)
SOFTCAP = 30.0
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One line of the table: errors are multiples of those of plain PyTorch, rates TFLOP/s of the pairs seen."""

    kernel: str
    width: str
    window: str
    kind: str
    error: float
    forward: float
    backward: float
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    parser.add_argument("--tokens", type=int, default=32_768, help="queries of a timed call")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each call is repeated")
    parser.add_argument("--only", nargs="*", default=[], help="names of kernels")
    options = parser.parse_args()
    torch.manual_seed(0)
    kernels = [*KERNELS.values(), _native_cudnn()]
    cases = []
    for kernel in kernels:
        if options.only and kernel.name not in options.only:
            continue
        for case in _cases(kernel, options.tokens, options.seconds):
            cases.append(case)
            print(*(f"{value:.2f}" if isinstance(value, float) else value for value in astuple(case)), flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(Case)])
            writer.writerows(map(astuple, cases))
    if wrong := [case for case in cases if case.error > 2]:
        sys.exit(f"{len(wrong)} cases are wrong: {wrong[0]}, ...")


def _native_cudnn() -> Kernel:
    """cuDNN beyond what our table asks of it: is it right at these widths, and fast?"""
    return Kernel(
        name="cudnn-any-width",
        forward=_cudnn_forward,
        backward=_cudnn_backward,
        why_not=lambda device, dtype, spec: "no window, no softcap" if spec.window or spec.softcap else None,
        row_shape=CUDNN.row_shape,
    )


def _cases(kernel: Kernel, tokens: int, seconds: float) -> list[Case]:
    device = torch.device("cuda")
    found = []
    for heads in HEADS:
        for window in WINDOWS:
            for softcap in (None, SOFTCAP):
                spec = _spec(heads, window, softcap)
                name = (
                    kernel.name,
                    f"{heads[2]}/{heads[3]}",
                    str(window or "full"),
                    "softcap" if softcap else "plain",
                )
                if (reason := kernel.why_not(device, DTYPE, spec)) is not None:
                    found.append(Case(*name, 0.0, 0.0, 0.0, reason))
                    continue
                try:
                    error = max(_error(kernel, heads, window, softcap, sinks=sinks) for sinks in (False, True))
                    rates = _rates(kernel, heads, spec, min(tokens, kernel.row_tokens), seconds)
                    found.append(Case(*name, error, *rates))
                except (RuntimeError, AssertionError, ValueError, TypeError) as failed:
                    found.append(Case(*name, 0.0, 0.0, 0.0, " ".join(str(failed).split())[:120]))
                    torch.cuda.empty_cache()
    return found


def _spec(heads: tuple[int, int, int, int], window: int | None, softcap: float | None) -> AttentionSpec:
    q_heads, kv_heads, width, value_width = heads
    kind = {"window": window, "softcap": softcap, "grouped": q_heads != kv_heads}
    return AttentionSpec(scale=width**-0.5, head_dim=width, value_dim=value_width, **kind)  # type: ignore[arg-type]


def _normal(tokens: int, heads: int, width: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.float64)).to(DTYPE)


def _error(
    kernel: Kernel, heads: tuple[int, int, int, int], window: int | None, softcap: float | None, *, sinks: bool
) -> float:
    """The largest of the errors of out, dq, dk, dv and the sinks' gradient, in those of plain bfloat16."""
    q_heads, kv_heads, width, value_width = heads
    window = None if window is None else min(window, 300)
    spec = _spec(heads, window, softcap)
    q, k, v = _normal(512, q_heads, width, 3.0), _normal(1280, kv_heads, width), _normal(1280, kv_heads, value_width)
    dout = _normal(512, q_heads, value_width)
    s = torch.randn(q_heads, device="cuda", dtype=torch.float64).to(DTYPE) * 3 if sinks else None
    leaves = [q, k, v] if s is None else [q, k, v, s]

    def by_hand(dtype: torch.dtype) -> list[Tensor]:
        wide = [x.to(dtype).requires_grad_() for x in leaves]
        out, _ = attention(*wide, scale=spec.scale, window=window, softcap=softcap)
        return [out.detach(), *torch.autograd.grad(out, wide, dout.to(dtype))]

    ours = _by_kernel(kernel, spec, (q, k, v), dout, s)
    exact, plain = by_hand(torch.float64), by_hand(DTYPE)
    errors = [
        float((mine.double() - true).norm() / (naive.double() - true).norm())
        for mine, naive, true in zip(ours, plain, exact, strict=True)
    ]
    return max(errors)


def _by_kernel(
    kernel: Kernel, spec: AttentionSpec, qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, sinks: Tensor | None
) -> list[Tensor]:
    """Out, gradients of q, k, v and of sinks, by the calls that a row makes: one, or a full and a causal one."""
    q, k, v = qkv
    start, stop = k.shape[1] - q.shape[1], k.shape[1]
    spans = [Span(first_key(start, spec.window), stop, True)]
    if spec.window is None and kernel.row_shape != "prefix":
        spans = [Span(start, stop, True), Span(0, start, False)]
    keys = [slice(span.start, span.stop) for span in spans]
    stream = ((span, k[:, part], v[:, part]) for span, part in zip(spans, keys, strict=True))
    row = forward_row(kernel, q, stream, spec=spec, sinks_N=sinks)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in qkv)
    for span, part in zip(spans, keys, strict=True):
        grads = kernel.backward(dout, q, k[:, part], v[:, part], *row, causal=span.causal, spec=spec)
        dq += grads[0]
        dk[:, part] += grads[1]
        dv[:, part] += grads[2]
    return [row[0], dq, dk, dv, *([] if sinks is None else [sinks_gradient(dout, row, sinks)])]


def _rates(
    kernel: Kernel, heads: tuple[int, int, int, int], spec: AttentionSpec, tokens: int, seconds: float
) -> tuple[float, float]:
    q_heads, kv_heads, width, value_width = heads
    past = 0 if spec.window is None else spec.window - 1
    q, dout = _normal(tokens, q_heads, width), _normal(tokens, q_heads, value_width)
    k, v = _normal(tokens + past, kv_heads, width), _normal(tokens + past, kv_heads, value_width)
    pairs = tokens**2 if spec.window is None else seen_pairs(past, past + tokens, spec.window)
    causal = spec.window is not None
    operations = 2 * pairs * q_heads * (width + value_width) / 1e12
    out, lse = kernel.forward(q, k, v, causal=causal, spec=spec)
    device = torch.device("cuda")
    forward = rate_of(operations, lambda: kernel.forward(q, k, v, causal=causal, spec=spec), device, seconds)
    again = BACKWARD_OPERATIONS * operations
    how = {"causal": causal, "spec": spec}
    return forward, rate_of(again, lambda: kernel.backward(dout, q, k, v, out, lse, **how), device, seconds)


if __name__ == "__main__":
    main()
