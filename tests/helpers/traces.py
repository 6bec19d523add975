"""Chrome traces made by hand, in the form torch.profiler writes on a GPU: kernels, copies, annotations, launches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

COMPUTE, OTHER_COMPUTE, TO_DEVICE, TO_HOST = 7, 11, 20, 24  # streams
HOST, THREAD = 4242, 4243
ORIGIN_US = 5_000_000_000.0

GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"
FORWARD = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor0000o11112"
BACKWARD = "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__tensor0000o11112"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float> >(int, float)"
COPY_NAMES = {
    "HtoD": "Memcpy HtoD (Pinned -> Device)",
    "DtoH": "Memcpy DtoH (Device -> Pinned)",
    "DtoD": "Memcpy DtoD (Device -> Device)",
}


class TraceBuilder:
    """Collects events; times are given in ms of the device's clock."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._correlation = 0

    def _add(self, category: str, name: str, ms: tuple[float, float], lane: tuple[int, int], **args: Any) -> None:
        pid, tid = lane
        times = {"ts": ORIGIN_US + 1e3 * ms[0], "dur": 1e3 * (ms[1] - ms[0])}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, **times, "args": args})

    def _launched(self, category: str, name: str, ms: tuple[float, float], stream: int, **args: Any) -> None:
        """A device activity, and the call that launched it: early, as the host runs ahead."""
        self._correlation += 1
        call = 0.5 * ms[0] - 10.0
        self._add(
            "cuda_runtime", "cudaLaunchKernel", (call, call + 0.004), (HOST, THREAD), correlation=self._correlation
        )
        self._add(category, name, ms, (0, stream), stream=stream, device=0, correlation=self._correlation, **args)

    def kernel(self, name: str, start: float, end: float, stream: int = COMPUTE, **args: Any) -> None:
        """One kernel."""
        self._launched("kernel", name, (start, end), stream, grid=[1, 1, 1], block=[128, 1, 1], **args)

    def exchange(self, start: float, end: float, n_elements: int) -> None:
        """An all-to-all of NCCL's."""
        about = {"Collective name": "all_to_allv", "In msg nelems": n_elements}
        self.kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", start, end, OTHER_COMPUTE, **about)

    def copy(self, direction: str, start: float, end: float, n_bytes: float, stream: int) -> None:
        """One copy: "HtoD", "DtoH" or "DtoD"."""
        self._launched("gpu_memcpy", COPY_NAMES[direction], (start, end), stream, bytes=int(n_bytes))

    def phase(
        self, direction: str, layer: int, start: float, end: float, streams: tuple[int, ...] = (COMPUTE,)
    ) -> None:
        """The block of one pass through one layer: on the host, and on each stream it used."""
        name = f"fpdt::{direction} layer {layer} (LlamaDecoderLayer)"
        self._add("user_annotation", name, (0.5 * start - 10.0, 0.5 * end - 10.0), (HOST, THREAD))
        for stream in streams:
            self._add("gpu_user_annotation", name, (start, end), (0, stream))

    def content(self, **top_level: Any) -> dict[str, Any]:
        """The whole file's content, with the things around that every trace holds."""
        around = [
            {"ph": "M", "name": "process_name", "pid": HOST, "ts": ORIGIN_US, "args": {"name": "python"}},
            {"ph": "s", "id": 1, "cat": "ac2g", "name": "ac2g", "pid": HOST, "tid": THREAD, "ts": ORIGIN_US},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": HOST, "tid": THREAD, "ts": ORIGIN_US, "dur": 9.0},
            {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "ts": ORIGIN_US, "dur": 1e6},
        ]
        return {"schemaVersion": 1, "displayTimeUnit": "ms", "traceEvents": [*around, *self.events], **top_level}


def write(content: Any, path: Path) -> Path:
    """As JSON, gzipped where the name says so."""
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def small_trace(*, marked: bool = True) -> TraceBuilder:
    """Three layers in two steps, of which the middle layer of the second step has known numbers.

    Its forward pass is [1000, 1090) and its backward pass [1200, 1300); `marked` says whether the device's side of
    the annotations is there.
    """
    t = TraceBuilder()
    streams = (COMPUTE, TO_DEVICE) if marked else ()
    for step_ms in (0.0, 900.0):  # the first step is a decoy under the same names
        for layer, start in ((0, 49.5), (2, 190.5)):
            t.kernel(GEMM, step_ms + start, step_ms + start + 50)
            t.phase("forward", layer, step_ms + start, step_ms + start + 50, streams)
    t.kernel(FORWARD, 100, 190)
    t.phase("forward", 1, 100, 190, streams)
    _known_forward(t, 1000.0)
    t.phase("forward", 1, 1000, 1090, streams)
    t.kernel(BACKWARD, 1200, 1260)
    t.kernel(GEMM, 1260.05, 1300)
    t.copy("HtoD", 1190, 1210, 1e9, TO_DEVICE)
    t.phase("backward", 1, 1200, 1300, streams)
    return t


def _known_forward(t: TraceBuilder, zero: float) -> None:
    t.kernel(GEMM, zero, zero + 20)
    t.kernel(FORWARD, zero + 20, zero + 60)
    t.kernel(ELEMENTWISE, zero + 55, zero + 61, OTHER_COMPUTE)
    t.kernel(GEMM, zero + 62, zero + 90)
    t.copy("HtoD", zero + 10, zero + 30, 1.0e9, TO_DEVICE)
    t.copy("HtoD", zero + 25, zero + 35, 0.5e9, TO_DEVICE + 1)
    t.copy("HtoD", zero + 60.5, zero + 61.5, 0.05e9, TO_DEVICE)
    t.copy("HtoD", zero + 80, zero + 100, 1.0e9, TO_DEVICE)
    t.copy("DtoH", zero + 61.25, zero + 63.25, 0.05e9, TO_HOST)
    t.copy("DtoD", zero + 61.2, zero + 61.8, 0.1e9, COMPUTE)


def long_trace(n_layers: int = 3, n_chunks: int = 4, chunk_ms: float = 20.0) -> TraceBuilder:
    """A step as FPDT makes it on a GPU: rows of attention over ever more keys, copies under them, short kernels."""
    t = TraceBuilder()
    now = 0.0
    for layer in range(n_layers):
        start = now
        for row in range(n_chunks):
            now = _forward_row(t, now, row, chunk_ms)
        t.phase("forward", layer, start, now, (COMPUTE, TO_DEVICE, TO_HOST))
    for layer in reversed(range(n_layers)):
        start = now
        for row in reversed(range(n_chunks)):
            now = _backward_row(t, now, row, chunk_ms)
        t.phase("backward", layer, start, now, (COMPUTE, TO_DEVICE, TO_HOST))
    return t


def _token_local(t: TraceBuilder, now: float, gemms: int, chunk_ms: float) -> float:
    for _ in range(gemms):
        t.kernel(GEMM, now, now + 0.2 * chunk_ms)
        now += 0.2 * chunk_ms + 0.004
        for _ in range(6):
            t.kernel(ELEMENTWISE, now, now + 0.012 * chunk_ms)
            now += 0.012 * chunk_ms + 0.003
    return now


def _forward_row(t: TraceBuilder, now: float, row: int, chunk_ms: float) -> float:
    t.copy("DtoH", now + 2, now + 2 + 0.25 * chunk_ms, 0.25 * chunk_ms * 52e6, TO_HOST)
    now = _token_local(t, now, 2, chunk_ms)
    for _ in range(row + 1):
        t.copy("HtoD", now, now + 0.3 * chunk_ms, 0.3 * chunk_ms * 54e6, TO_DEVICE)
        t.kernel(FORWARD, now, now + 0.8 * chunk_ms)
        now += 0.8 * chunk_ms + 0.004
    return _token_local(t, now, 3, chunk_ms)


def _backward_row(t: TraceBuilder, now: float, row: int, chunk_ms: float) -> float:
    t.copy("HtoD", now - 4, now + 0.3 * chunk_ms, (4 + 0.3 * chunk_ms) * 54e6, TO_DEVICE)
    now = _token_local(t, now + (3.0 if row == 1 else 0.0), 6, chunk_ms)
    for _ in range(row + 1):
        t.copy("HtoD", now, now + 0.5 * chunk_ms, 0.5 * chunk_ms * 54e6, TO_DEVICE)
        t.kernel(BACKWARD, now, now + 2 * chunk_ms)
        now += 2 * chunk_ms + 0.004
        t.copy("DtoH", now, now + 0.4 * chunk_ms, 0.4 * chunk_ms * 52e6, TO_HOST)
    return _token_local(t, now, 3, chunk_ms)
