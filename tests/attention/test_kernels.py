"""Every kernel of the table against float64, forward and backward, in one call and in calls merged by lse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_fpdt.attention import SCORE_BYTES, reference
from hf_fpdt.attention.kernels.contract import Kernel
from hf_fpdt.attention.kernels.table import KERNELS, select_kernel
from hf_fpdt.attention.online import backward_row, forward_row
from hf_fpdt.attention.spec import AttentionSpec
from hf_fpdt.layout.chunks import Chunk, ChunkPlan
from hf_fpdt.layout.spans import Span, row_spans
from hf_fpdt.memory.kv import KVStore
from tests.helpers.live_bytes import live_bytes
from tests.helpers.support import assert_as_accurate, assert_rejects, max_error, peaked_qkv, relative_error

GPU_KERNELS = ("fa4", "flash-attn-3", "cudnn", "flash-attn-2", "flash")
Qkv = tuple[Tensor, Tensor, Tensor]


def truth(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv of whole attention by autograd in `dtype`, from the same rounded inputs."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out, _ = reference.attention(q, k, v, scale=scale)
    return [out, *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def naive_results(qkv: Qkv, dout: Tensor, scale: float, exact: list[Tensor]) -> list[Tensor]:
    """Per tensor, the less accurate of the two ways a user has in this dtype: softmax by hand, and SDPA."""
    by_hand = truth(*qkv, dout, scale, qkv[0].dtype)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
    sdpa = [x.transpose(1, 2) for x in (out, *grads)]
    return [max(pair, key=lambda x: max_error(x, t)) for *pair, t in zip(by_hand, sdpa, exact, strict=True)]


def by_rows(kernel: Kernel, qkv: Qkv, dout: Tensor, scale: float, chunk: int, spans_of: object = None) -> list[Tensor]:
    """out, dq, dk, dv over rows of `chunk` queries, as the layer executor runs them."""
    q, k, v = qkv
    plan, spec = ChunkPlan(q.shape[1], chunk), AttentionSpec.of(q, k, v, scale)
    store = KVStore(plan)
    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    rows = {}
    for c in plan.chunks:
        store.put(c, k[:, c.rank_slice], v[:, c.rank_slice])
        spans = (spans_of or spans_for)(kernel, c, chunk)  # type: ignore[operator]
        rows[c.index] = forward_row(kernel, q[:, c.rank_slice], store.stream(spans), spec=spec)
        out[:, c.rank_slice] = rows[c.index][0]
    for c in reversed(plan.chunks):
        part = slice(c.start, c.stop)
        spans = (spans_of or spans_for)(kernel, c, chunk)  # type: ignore[operator]
        dq[:, part] = backward_row(kernel, dout[:, part], q[:, part], rows[c.index], store, spans, spec=spec)
        dk[:, part], dv[:, part] = store.take_grad(c)
    return [out, dq, dk, dv]


def spans_for(kernel: Kernel, chunk: Chunk, unit: int) -> tuple[Span, ...]:
    return row_spans(chunk.start, chunk.stop, shape=kernel.row_shape, unit_tokens=unit)


def cpu_cases() -> Iterator[object]:
    for name in ("math", "cpu"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for heads in ((4, 4), (4, 2), (4, 1)):
                yield pytest.param(name, dtype, heads, id=f"{name}-{str(dtype)[6:]}-{heads[0]}x{heads[1]}")


@pytest.mark.parametrize(("name", "dtype", "heads"), cpu_cases())
@pytest.mark.parametrize(("n_tokens", "chunk"), [(63, 16), (64, 64), (200, 64)])
def test_rows_are_as_accurate_as_whole_attention(
    name: str, dtype: torch.dtype, heads: tuple[int, int], n_tokens: int, chunk: int
) -> None:
    qkv = peaked_qkv(2, n_tokens, n_tokens, *heads, 16, dtype)
    dout = torch.randn_like(qkv[0])
    ours = by_rows(KERNELS[name], qkv, dout, 0.25, chunk)
    exact = truth(*qkv, dout, 0.25, torch.float64)
    naive = naive_results(qkv, dout, 0.25, exact)
    for part, a, b, t in zip(("out", "dq", "dk", "dv"), ours, naive, exact, strict=True):
        if dtype == torch.float64:
            assert relative_error(a, t) < 1e-12, part
        else:
            assert_as_accurate(a, b, t, name=part)


@pytest.mark.parametrize("name", ["math", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_token_attends_to_itself(name: str, dtype: torch.dtype) -> None:
    """out = v and dv = dout; q and k have no influence, so their gradients vanish against the score's size."""
    q, k, v = peaked_qkv(2, 1, 1, 4, 4, 16, dtype)
    dout = torch.randn_like(q)
    out, dq, dk, dv = by_rows(KERNELS[name], (q, k, v), dout, 0.25, 8)
    assert torch.equal(out, v) and torch.equal(dv, dout)
    crumb = 100 * torch.finfo(dtype).eps * float(q.abs().max())
    assert float(dq.abs().max()) < crumb and float(dk.abs().max()) < crumb


@pytest.mark.parametrize("name", ["math", "cpu"])
def test_the_check_rejects_broken_attention(name: str) -> None:
    qkv = peaked_qkv(1, 100, 100, 4, 2, 16, torch.float32)
    dout = torch.randn_like(qkv[0])
    exact = truth(*qkv, dout, 0.25, torch.float64)
    naive = naive_results(qkv, dout, 0.25, exact)

    def check(results: list[Tensor]) -> None:
        for a, b, t in zip(results, naive, exact, strict=True):
            assert_as_accurate(a, b, t)

    def run(spans_of: object = None, scale: float = 0.25) -> list[Tensor]:
        return by_rows(KERNELS[name], qkv, dout, scale, 32, spans_of)

    check(run())
    broken = {
        "scale 1/sqrt(heads*head_dim)": run(scale=0.125),
        "first chunk dropped": run(lambda k, c, u: spans_for(k, c, u)[1:] if c.start else spans_for(k, c, u)),
        "diagonal unmasked": run(lambda k, c, u: [Span(s.start, s.stop, False) for s in spans_for(k, c, u)]),
    }
    assert_rejects(check, broken)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["plain", "grouped"])
@pytest.mark.parametrize(("n_tokens", "chunk"), [(1000, 256), (2048, 2048)])
def test_gpu_kernels_are_as_accurate_as_whole_attention(
    name: str, dtype: torch.dtype, head_dim: int, heads: tuple[int, int], n_tokens: int, chunk: int
) -> None:
    kernel = KERNELS[name]
    reason = kernel.why_not(torch.device("cuda"), dtype, AttentionSpec.plain(head_dim))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v = (x.cuda() for x in peaked_qkv(1, n_tokens, n_tokens, *heads, head_dim, dtype))
    dout, scale = torch.randn_like(q), head_dim**-0.5
    exact = truth(q, k, v, dout, scale, torch.float64)
    naive = naive_results((q, k, v), dout, scale, exact)

    def check(results: list[Tensor]) -> None:
        for part, a, b, t in zip(("out", "dq", "dk", "dv"), results, naive, exact, strict=True):
            assert_as_accurate(a, b, t, name=part)

    check(by_rows(kernel, (q, k, v), dout, scale, chunk))
    unmasked = by_rows(
        kernel, (q, k, v), dout, scale, chunk, lambda *a: [Span(s.start, s.stop, False) for s in spans_for(*a)]
    )
    assert_rejects(check, {"scale": by_rows(kernel, (q, k, v), dout, scale / 2, chunk), "diagonal": unmasked})


def test_auto_takes_the_cpu_kernel_on_a_cpu() -> None:
    assert select_kernel("auto", torch.device("cpu"), torch.float32, AttentionSpec.plain(64)).name == "cpu"


def test_a_named_kernel_that_cannot_serve_raises_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="flash: runs on CUDA devices, not on cpu"):
        select_kernel("flash", torch.device("cpu"), torch.bfloat16, AttentionSpec.plain(64))


def test_an_unknown_kernel_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="'fa5' is not known.*fa4.*math"):
        select_kernel("fa5", torch.device("cpu"), torch.bfloat16, AttentionSpec.plain(64))


def test_the_choice_is_logged_with_what_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hf_fpdt"):
        select_kernel("auto", torch.device("cpu"), torch.float16, AttentionSpec.plain(24))
        select_kernel("auto", torch.device("cpu"), torch.float16, AttentionSpec.plain(24))
    (line,) = [record.message for record in caplog.records]
    assert "'cpu'" in line and "fa4: runs on CUDA devices" in line


def test_math_is_not_narrowed_by_autocast() -> None:
    qkv = peaked_qkv(1, 40, 40, 2, 2, 16, torch.float32)
    plain = KERNELS["math"].forward(*qkv, causal=True, spec=AttentionSpec.plain(16, 0.25))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrowed = KERNELS["math"].forward(*qkv, causal=True, spec=AttentionSpec.plain(16, 0.25))
    assert all(torch.equal(a, b) for a, b in zip(plain, narrowed, strict=True))


MATH = importlib.import_module("hf_fpdt.attention.kernels.math")


@pytest.mark.parametrize("spec", [{}, {"window": 9, "softcap": 3.0}], ids=["plain", "window and softcap"])
@pytest.mark.parametrize("causal", [True, False])
def test_math_gives_the_same_with_few_scores_at_a_time(
    causal: bool, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = peaked_qkv(2, 21, 50, 4, 2, 8, torch.float64)
    how: dict[str, Any] = {"causal": causal, "spec": replace(AttentionSpec.plain(8), grouped=True, **spec)}

    def run(most: int) -> list[Tensor]:
        monkeypatch.setattr(MATH, "MOST_SCORES", most)
        out, lse = KERNELS["math"].forward(q, k, v, **how)
        return [out, lse, *KERNELS["math"].backward(out.sin(), q, k, v, out, lse, **how)]

    whole = run(2**62)

    def check(parts: list[Tensor]) -> None:
        assert all(relative_error(part, one) < 1e-13 for part, one in zip(parts, whole, strict=True))

    for most in (1, 50 * 2 * 4 * 4, 50 * 2 * 4 * 20):  # one query at a time, four, twenty
        check(run(most))
    last = [*whole[:3], *(torch.zeros_like(x) for x in whole[3:])]
    assert_rejects(check, {"sums of the last part alone": last})


def test_math_has_no_more_scores_than_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = peaked_qkv(1, 512, 512, 8, 8, 8, torch.float32)
    how: dict[str, Any] = {"causal": True, "spec": replace(AttentionSpec.plain(8), softcap=3.0)}
    share = 2**16 / MATH.MOST_SCORES

    def check(most: int) -> None:
        monkeypatch.setattr(MATH, "MOST_SCORES", most)
        with live_bytes() as counter:
            out, lse = KERNELS["math"].forward(q, k, v, **how)
            KERNELS["math"].backward(out.sin(), q, k, v, out, lse, **how)
        # Beside scores some tensors as large as q.
        assert counter.peak <= share * SCORE_BYTES + 16 * q.nbytes

    check(2**16)
    assert_rejects(check, {"all at once": 2**62})


@pytest.fixture
def as_before() -> Iterator[None]:
    """Deterministic algorithms are off again after the test."""
    yield
    torch.use_deterministic_algorithms(False)


def test_kernels_are_asked_to_be_deterministic(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that have to be asked; one that cannot is passed over."""
    asked: list[Any] = []

    def backward(*args: Any, **options: Any) -> Any:
        asked.append(options["deterministic"])
        return args

    package = SimpleNamespace(_flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    torch.use_deterministic_algorithms(True)
    KERNELS["fa4"].backward(*[torch.zeros(1)] * 6, causal=True, spec=AttentionSpec.plain(64))
    torch.use_deterministic_algorithms(False)
    with pytest.raises(KeyError, match="deterministic"):
        KERNELS["fa4"].backward(*[torch.zeros(1)] * 6, causal=True, spec=AttentionSpec.plain(64))
    assert asked == [True]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    case = torch.device("cuda"), torch.bfloat16, AttentionSpec.plain(64)
    assert KERNELS["cudnn"].why_not(*case) is None
    torch.use_deterministic_algorithms(True)
    assert "not deterministic" in (KERNELS["cudnn"].why_not(*case) or "")


def test_kernels_of_nvidia_alone_are_passed_over_on_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There "cuda" is an AMD GPU of a capability like a Hopper's, and cuDNN is MIOpen."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute.interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="2.8.3"))
    case = torch.device("cuda"), torch.bfloat16, AttentionSpec.plain(104)
    assert KERNELS["cudnn"].why_not(*case) is None
    monkeypatch.setattr(torch.version, "hip", "7.0.2")
    reasons = {name: kernel.why_not(*case) for name, kernel in KERNELS.items()}
    assert reasons["flash-attn-2"] is None and select_kernel("auto", *case).name == "flash-attn-2"
    for name in ("fa4", "flash-attn-3", "cudnn"):
        assert reasons[name] == "runs on NVIDIA GPUs alone (this PyTorch is built for ROCm 7.0.2)"
    assert "aligns the causal mask with the first key" in (reasons["flash"] or "")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert "NVIDIA" in (KERNELS["cudnn"].why_not(*case) or "")


def test_the_choice_is_made_again_for_deterministic_algorithms(
    as_before: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="hf_fpdt"):
        for on in (False, True):
            torch.use_deterministic_algorithms(on)
            select_kernel("auto", torch.device("cpu"), torch.float32, AttentionSpec.plain(40))
    assert len(caplog.records) == 2 and "deterministic" in caplog.messages[1]
