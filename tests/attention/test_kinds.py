"""Windows, softcap, sinks and values of another width: every CPU kernel against the slow twin, in rows and whole."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

import hf_fpdt.engine.whole
from hf_fpdt import attend_whole
from hf_fpdt.attention import reference
from hf_fpdt.attention.kernels.contract import Kernel
from hf_fpdt.attention.kernels.math import MATH
from hf_fpdt.attention.kernels.table import KERNELS, select_kernel
from hf_fpdt.attention.online import backward_row, forward_row
from hf_fpdt.attention.rows import kernel_spans
from hf_fpdt.attention.sinks import sinks_gradient
from hf_fpdt.attention.spec import AttentionSpec
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.layout.spans import RowShape
from hf_fpdt.memory.kv import KVStore
from hf_fpdt.memory.windowed_kv import WindowedKV
from tests.helpers.support import assert_as_accurate, assert_rejects, max_error, peaked_qkv

Inputs = tuple[Tensor, ...]  # q, k, v and, where there are some, sinks
Kind = dict[str, Any]  # window and softcap
SCALE, SOFTCAP, ROW = 0.25, 8.0, 16
SINKS = (-30.0, 0.0, 30.0, 3.0)
WINDOWS = (None, 1, 2, 7, 16, 17, 39, 40, 100)


def inputs(
    q_len: int, kv_len: int, heads: tuple[int, int] = (4, 2), widths: tuple[int, int] = (16, 16), sinks: bool = False
) -> Inputs:
    """Float64; the softmax has peaks, and the sinks are nothing, something and all of it."""
    q, k, _ = peaked_qkv(2, q_len, kv_len, *heads, widths[0], torch.float64)
    q = q * (16 / widths[0]) ** 0.5  # of equal scores for each width
    v = torch.randn(2, kv_len, heads[1], widths[1], dtype=torch.float64)
    return (q, k, v, torch.tensor(SINKS[: heads[0]], dtype=torch.float64)) if sinks else (q, k, v)


def gradients(attend: Callable[..., Tensor], given: Inputs, dout: Tensor) -> list[Tensor]:
    """out, and the gradients of q, k, v and sinks."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def twin(kind: Kind) -> Callable[..., Tensor]:
    return lambda *given: reference.attention(*given, scale=SCALE, **kind)[0]


def ours(kernel: str, kind: Kind) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return attend_whole(q, k, v, sinks_N=sinks, scale=SCALE, kernel=kernel, **kind)

    return attend


def assert_exact(results: list[Tensor], exact: list[Tensor]) -> None:
    """To float64's rounding; gradients that vanish are measured against the others."""
    floor = max(float(x.abs().max()) for x in exact[1:])
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), results, exact, strict=False):
        size = float(b.abs().max()) if name == "out" else max(float(b.abs().max()), 0.1 * floor)
        assert max_error(a, b) <= 1e-12 * size, f"{name}: {max_error(a, b) / size:.1e}"
    assert len(results) == len(exact)


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16 queries, so that a few tokens make several of them."""

    def select(name: str, *case: Any) -> Kernel:
        return replace(select_kernel(name, *case), row_tokens=ROW)

    monkeypatch.setattr(hf_fpdt.engine.whole, "select_kernel", select)


KINDS: dict[str, Kind] = {f"window {window}": {"window": window} for window in WINDOWS}
KINDS |= {f"window {window}, softcap": {"window": window, "softcap": SOFTCAP} for window in (None, 1, 7, 17)}
SERVED = [("math", kind) for kind in KINDS] + [("cpu", kind) for kind in KINDS if "softcap" not in KINDS[kind]]


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize(("kernel", "kind"), SERVED)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("lengths", [(40, 40), (21, 40), (1, 9)], ids=str)
def test_whole_attention_of_a_kind_is_exact(kernel: str, kind: str, sinks: bool, lengths: tuple[int, int]) -> None:
    given = inputs(*lengths, sinks=sinks)
    dout = torch.randn_like(given[0])
    exact = gradients(twin(KINDS[kind]), given, dout)
    assert_exact(gradients(ours(kernel, KINDS[kind]), given, dout), exact)


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("kernel", ["math", "cpu"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (24, 24), (80, 80), (192, 128), (128, 192), (256, 256)], ids=str)
def test_widths_of_keys_and_values_are_exact(kernel: str, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    given = inputs(37, 40, heads, widths, sinks=True)
    dout = torch.randn(2, 37, heads[0], widths[1], dtype=torch.float64)
    for kind in (KINDS["window None"], KINDS["window 7"]):
        exact = gradients(twin(kind), given, dout)
        assert_exact(gradients(ours(kernel, kind), given, dout), exact)
    if widths[0] > widths[1]:
        cut = gradients(lambda q, k, v, s: twin(kind)(q[..., : widths[1]], k[..., : widths[1]], v, s), given, dout)
        assert_rejects(lambda wrong: assert_exact(wrong, exact), {"keys cut to the width of values": cut})


def scores_of(q: Tensor, k: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Scores [B, N, S, T] of as many queries as keys, and where they do not count."""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bsnh,btnh->bnst", q, keys) * SCALE
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores, hidden if window is None else hidden | torch.ones_like(hidden).tril(-window)


def capped_without_slope(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """The softcap's factor 1 - tanh² left out of the gradient."""
    scores, hidden = scores_of(q, k, 7)
    scores = scores + (SOFTCAP * torch.tanh(scores / SOFTCAP) - scores).detach()
    shares = torch.cat([scores.masked_fill(hidden, -torch.inf), sinks_column(scores, sinks)], -1).softmax(-1)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bnst,btnh->bsnh", shares[..., :-1], values)


def sinks_column(scores: Tensor, sinks: Tensor) -> Tensor:
    return sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)


@pytest.mark.usefixtures("small_rows")
def test_the_check_rejects_broken_kinds() -> None:
    kind: Kind = {"window": 7, "softcap": SOFTCAP}
    given = inputs(40, 40, sinks=True)
    dout = torch.randn_like(given[0])
    exact = gradients(twin(kind), given, dout)

    def run(scale_sinks: float = 1.0, **changes: Any) -> list[Tensor]:
        return gradients(lambda *x: ours("math", kind | changes)(*x[:3], x[3] * scale_sinks), given, dout)

    assert_exact(run(), exact)
    no_sinks = [*gradients(ours("math", kind), given[:3], dout), torch.zeros_like(given[3])]
    frozen = run()
    frozen[4] = torch.zeros_like(frozen[4])
    broken = {
        "a window of one key more": run(window=8),
        "a window of one key less": run(window=6),
        "no window": run(window=None),
        "no softcap": run(softcap=None),
        "another softcap": run(softcap=SOFTCAP * 1.01),
        "softcap without its slope": gradients(capped_without_slope, given, dout),
        "no sinks": no_sinks,
        "sinks scaled as scores are": run(scale_sinks=SCALE),
        "sinks without a gradient": frozen,
    }
    assert_rejects(lambda wrong: assert_exact(wrong, exact), broken)


def by_sdpa(given: Inputs, dout: Tensor, window: int | None) -> list[Tensor]:
    """out, dq, dk, dv; the sinks are the mask's, at a key of zeros."""
    sinks = given[3].view(1, -1, 1, 1)
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    s, t = q.shape[1], k.shape[1]
    hidden = torch.ones(s, t, dtype=torch.bool).triu(t - s + 1)
    hidden |= torch.zeros_like(hidden) if window is None else torch.ones_like(hidden).tril(t - s - window)
    mask = torch.zeros(1, q.shape[2], s, t, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    mask = torch.cat([mask, sinks.expand(1, -1, s, 1)], -1)
    keys, values = (pad(x, (0, 0, 0, 0, 0, 1)).transpose(1, 2) for x in (k, v))
    out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=SCALE, enable_gqa=True)
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def by_lse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Capped, with shares exp(score - lse): so does every kernel that keeps no shares for its backward pass."""
    scores, hidden = scores_of(q, k, window)
    scores = (SOFTCAP * torch.tanh(scores / SOFTCAP)).masked_fill(hidden, -torch.inf)
    lse = torch.cat([scores, sinks_column(scores, sinks)], -1).logsumexp(-1, keepdim=True)
    return torch.einsum("bnst,btnh->bsnh", (scores - lse).exp(), v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "kind"), SERVED)
def test_narrow_dtypes_are_as_accurate_as_other_ways(kernel: str, kind: str, dtype: torch.dtype) -> None:
    """The less accurate of two ways: softmax by hand, and by lse, which is SDPA's or, for a softcap, written out."""
    window, softcap = KINDS[kind]["window"], KINDS[kind].get("softcap")
    wide = tuple(x.to(dtype).double() for x in (*inputs(40, 40), torch.tensor([-8.0, 0.0, 3.0, 5.0])))
    narrow = tuple(x.to(dtype) for x in wide)
    dout = torch.randn_like(narrow[0])
    exact = gradients(twin(KINDS[kind]), wide, dout.double())
    naive = gradients(twin(KINDS[kind]), narrow, dout)
    if softcap is None:
        other = by_sdpa(narrow, dout, window)
    else:
        other = gradients(partial(by_lse, window=window), narrow, dout)
    pairs = zip(naive, other, exact, strict=False)
    naive[: len(other)] = [max(pair, key=partial(max_error, b=t)) for *pair, t in pairs]
    results = gradients(ours(kernel, KINDS[kind]), narrow, dout)
    for name, a, b, t in zip(("out", "dq", "dk", "dv", "dsinks"), results, naive, exact, strict=True):
        if window == 1 and name in ("dq", "dk"):  # zero: what is left is rounding of something of this size
            assert max_error(a, t) < 100 * torch.finfo(dtype).eps * SCALE * float(narrow[0].abs().max())
        else:
            assert_as_accurate(a, b, t, name=name)


# -- rows of chunks, merged from several calls ------------------------------------------------------------------------


def by_rows(kernel: Kernel, given: Inputs, dout: Tensor, chunk: int, kind: Kind, **bug: bool) -> list[Tensor]:
    """As the layer executor runs them: a store of all keys, or with a window the ring of those that a row reads."""
    q, k, v, *sinks = given
    window = kind.get("window")
    plan, spec = ChunkPlan(q.shape[1], chunk), AttentionSpec.of(q, k, v, SCALE, **kind)
    out, dq, dk, dv = dout.new_empty(dout.shape), *(torch.empty_like(x) for x in (q, k, v))
    rows, sinks_N = {}, sinks[0] if sinks else None
    d_sinks = [torch.zeros_like(x) for x in sinks]
    stores = [KVStore(plan) if window is None else WindowedKV(plan, window) for _ in range(2)]
    for c in plan.chunks:
        tokens = c.rank_slice
        stores[0].put(c, k[:, tokens], v[:, tokens])
        spans = kernel_spans(kernel, (c.start, c.stop), chunk, stores[0], window=window)
        spans = spans[:-1] if bug.get("span_lost") and len(spans) > 1 else spans
        stream = stores[0].stream(spans)
        rows[c.index] = forward_row(kernel, q[:, tokens], stream, spec=spec, sinks_N=sinks_N)
        if bug.get("sink_each_call") and sinks_N is not None and len(spans) > 1:
            rows[c.index] = with_sink_twice(rows[c.index], sinks_N)
        out[:, tokens] = rows[c.index][0]
    for c in reversed(plan.chunks):
        tokens = c.rank_slice
        for each in (*stores[1].missing(c), *(() if stores[1].holds(c) else (c,))):
            stores[1].put(each, k[:, each.rank_slice], v[:, each.rank_slice])
        spans = kernel_spans(kernel, (c.start, c.stop), chunk, stores[1], window=window, most_tokens=2 * chunk)
        row = rows[c.index]
        dq[:, tokens] = backward_row(kernel, dout[:, tokens], q[:, tokens], row, stores[1], spans, spec=spec)
        for total in d_sinks:
            total += sinks_gradient(dout[:, tokens], row, sinks[0])
        dk[:, tokens], dv[:, tokens] = stores[1].take_grad(c)
    return [out, dq, dk, dv, *d_sinks]


def with_sink_twice(row: tuple[Tensor, Tensor], sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(row[1], sinks_N[:, None])
    return row[0] * (row[1] - lse).exp().transpose(1, 2)[..., None], lse


@pytest.mark.parametrize("kernel", ["math", "cpu"])
@pytest.mark.parametrize("shape", ["pair", "rectangle"])
@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_rows_of_chunks_are_exact(kernel: str, shape: RowShape, chunk: int) -> None:
    """Chunks that do and do not divide 61 tokens, rows merged of several calls, sinks once a row."""
    shaped, given = replace(KERNELS[kernel], row_shape=shape), inputs(61, 61, widths=(16, 8), sinks=True)
    dout = torch.randn(2, 61, 4, 8, dtype=torch.float64)
    for window, softcap in itertools.product((None, 1, 5, 8, 9, 40, 60), (None, SOFTCAP)):
        if softcap is not None and kernel == "cpu":
            continue
        kind = {"window": window, "softcap": softcap}
        exact = gradients(twin(kind), given, dout)
        assert_exact(by_rows(shaped, given, dout, chunk, kind), exact)
        if window is None and chunk < 61:
            broken = {
                "a call of the row lost": by_rows(shaped, given, dout, chunk, kind, span_lost=True),
                "sinks merged twice": by_rows(shaped, given, dout, chunk, kind, sink_each_call=True),
            }
            assert_rejects(partial(assert_exact, exact=exact), broken)


def keys_seen(kernel: Kernel, start: int, stop: int, window: int | None, unit: int) -> Tensor:
    """How often each query of the row sees each key; no call may have a query that sees none."""
    k = torch.empty(1, stop, 1, 1, device="meta")
    seen = torch.zeros(stop - start, stop, dtype=torch.long)
    queries = torch.arange(start, stop)[:, None]
    for span in kernel_spans(kernel, (start, stop), unit, KVStore.holding(k, k), window=window):
        keys = torch.arange(span.start, span.stop)
        sees = torch.ones(stop - start, len(keys), dtype=torch.bool)
        if span.causal:
            assert span.stop == stop, "the last query is aligned with the last key"
            sees = (keys <= queries) & (keys > queries - (stop + 1 if window is None else window))
        assert bool(sees.any(1).all()), f"{span}: a query sees no key"
        seen[:, span.start : span.stop] += sees
    return seen


@pytest.mark.parametrize("shape", ["prefix", "rectangle", "pair"])
def test_every_query_of_every_call_sees_a_key_and_each_key_once(shape: RowShape) -> None:
    kernel = replace(MATH, row_shape=shape)
    for start, length, window in itertools.product(
        (0, 1, 8, 13, 16, 29), (1, 5, 8), (None, 1, 2, 7, 8, 9, 16, 30, 50)
    ):
        if shape == "pair" and start % 8:
            continue
        stop = start + length
        seen = keys_seen(kernel, start, stop, window, 8)
        keys, queries = torch.arange(stop), torch.arange(start, stop)[:, None]
        expected = (keys <= queries) & (keys > queries - (stop + 1 if window is None else window))
        assert torch.equal(seen, expected.long()), (start, stop, window)
        if window is not None and window <= start:
            assert int(seen.bool().any(0).sum()) == length + window - 1, "keys are handed over that nobody sees"


def test_a_window_too_long_for_one_call_is_refused() -> None:
    k = torch.empty(1, 2**22, 8, 128, device="meta")
    diagonal = (2**22 - 2**15, 2**22)
    assert len(kernel_spans(MATH, diagonal, 2**15, KVStore.holding(k, k), window=4096)) == 1
    with pytest.raises(NotImplementedError, match="use shorter chunks"):
        kernel_spans(MATH, diagonal, 2**15, KVStore.holding(k, k), window=2**22 - 1)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_keys_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="a positive number of keys"):
        attend_whole(*inputs(8, 8), scale=1.0, window=window)


# -- what each kernel serves ------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which only the capability is asked, with every package installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_900)
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute.interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="2.8.3"))


def asked(**changes: Any) -> AttentionSpec:
    """Of a scale that no other test asks for: choices are remembered."""
    return replace(AttentionSpec.plain(128, 0.123), **changes)


EVERY = {"fa4", "flash-attn-3", "cudnn", "flash-attn-2", "flash", "efficient"}
ON_GPU: dict[str, tuple[AttentionSpec, set[str], str]] = {
    "plain": (asked(), EVERY, "fa4"),
    "window": (asked(window=9), {"fa4", "flash-attn-3", "flash-attn-2", "flash"}, "fa4"),
    "softcap": (asked(softcap=9.0), {"fa4", "flash-attn-3", "flash-attn-2"}, "fa4"),
    "both": (asked(window=9, softcap=9.0), {"fa4", "flash-attn-3", "flash-attn-2"}, "fa4"),
    "latent attention": (asked(head_dim=192), EVERY, "fa4"),
    "wide": (asked(head_dim=256, value_dim=256), EVERY, "fa4"),
    "wider": (asked(head_dim=512, value_dim=512), {"efficient"}, "efficient"),
    "a value's width is no multiple of 8": (asked(value_dim=100), set(), "math"),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", ON_GPU)
def test_a_kernel_says_what_it_does_not_serve(case: str) -> None:
    spec, served, first = ON_GPU[case]
    device = torch.device("cuda")
    reasons = {name: KERNELS[name].why_not(device, torch.bfloat16, spec) for name in EVERY}
    assert {name for name, reason in reasons.items() if reason is None} == served, reasons
    for name in EVERY - served:
        said = reasons[name] or ""
        assert any(word in said for word in ("window (9)", "softcap (9.0)", "head_dim that is a multiple of 8")), said
    assert select_kernel("auto", device, torch.bfloat16, spec).name == first
    assert KERNELS["math"].why_not(device, torch.bfloat16, spec) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("version", "capability"), [(91_002, (9, 0)), (91_900, (10, 0))])
def test_cudnn_takes_wide_heads_where_they_were_seen_to_be_right(
    version: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    why_not, gpu = KERNELS["cudnn"].why_not, torch.device("cuda")
    assert why_not(gpu, torch.bfloat16, WIDE) is None
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert "wider than 128 on Hopper alone" in (why_not(gpu, torch.bfloat16, WIDE) or "")
    assert why_not(gpu, torch.bfloat16, asked()) is None


WIDE = asked(head_dim=256, value_dim=256)
LATENT = asked(head_dim=192)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("capability", "served", "refused"),
    [
        ((9, 0), [WIDE, replace(WIDE, window=9, softcap=9.0), LATENT, replace(LATENT, grouped=True)], []),
        (
            (10, 0),
            [asked(window=9, softcap=9.0), WIDE, LATENT],
            [replace(WIDE, window=9), replace(WIDE, softcap=9.0), replace(LATENT, grouped=True), asked(head_dim=160)],
        ),
        ((12, 0), [asked(window=9, softcap=9.0)], [WIDE, LATENT]),
    ],
    ids=["Hopper", "Blackwell", "consumer Blackwell"],
)
def test_flash_attn_4_differs_by_gpu(
    capability: tuple[int, int],
    served: list[AttentionSpec],
    refused: list[AttentionSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    case = torch.device("cuda"), torch.bfloat16
    assert [KERNELS["fa4"].why_not(*case, spec) for spec in served] == [None] * len(served)
    assert all("on this GPU" in (KERNELS["fa4"].why_not(*case, spec) or "") for spec in refused)


@pytest.mark.usefixtures("hopper")
def test_kernels_that_are_deterministic_in_part_say_where_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    case = torch.device("cuda"), torch.bfloat16
    assert KERNELS["flash-attn-3"].why_not(*case, LATENT) is None
    assert "not deterministic" in (KERNELS["flash-attn-3"].why_not(*case, WIDE) or "")
    assert "not deterministic" in (KERNELS["efficient"].why_not(*case, WIDE) or "")
    assert KERNELS["fa4"].why_not(*case, WIDE) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    assert "not deterministic" in (KERNELS["fa4"].why_not(*case, asked()) or "")


def test_the_cpu_kernel_has_no_softcap_and_math_takes_over() -> None:
    spec = asked(softcap=7.0, window=5)
    assert KERNELS["cpu"].why_not(torch.device("cpu"), torch.float32, spec) == "does no softcap (7.0)"
    assert select_kernel("auto", torch.device("cpu"), torch.float32, spec).name == "math"


def calls_of_fake_package(monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec) -> Iterator[dict[str, Any]]:
    """What flash-attn-4 is asked for, forward and backward, in a causal call and in a full one."""
    asked_for: list[dict[str, Any]] = []

    def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        asked_for.append(options)
        return (v.repeat_interleave(q.shape[2] // v.shape[2], 2), q[..., 0]) if not args else (q, k, v)

    package = SimpleNamespace(_flash_attn_fwd=call, _flash_attn_bwd=call)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    q, k, v = (torch.zeros(1, 4, 2, width) for width in (spec.head_dim, spec.head_dim, spec.value_dim))
    for causal in (True, False):
        out, lse = KERNELS["fa4"].forward(q, k, v, causal=causal, spec=spec)
        assert out.shape == v.shape
        KERNELS["fa4"].backward(out, q, k, v, out, lse, causal=causal, spec=spec)
    return iter(asked_for)


def test_flash_attn_4_is_asked_for_the_window_and_the_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward, *full = calls_of_fake_package(monkeypatch, asked(window=9, softcap=5.0))
    for options in (forward, backward):
        assert (options["window_size_left"], options["window_size_right"], options["softcap"]) == (8, 0, 5.0)
    assert all("window_size_left" not in options and options["softcap"] == 5.0 for options in full)
    forward, backward, *_ = calls_of_fake_package(monkeypatch, asked())
    assert forward["softcap"] is None and backward["softcap"] == 0.0, "its two functions say no softcap in two ways"
