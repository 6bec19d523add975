"""Packed rows: every kernel, in packed calls or one document at a time, against each document alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_fpdt.engine.whole
from hf_fpdt import attend_whole
from hf_fpdt.attention import reference
from hf_fpdt.attention.kernels import table
from hf_fpdt.attention.kernels.contract import Kernel
from hf_fpdt.attention.kernels.table import KERNELS, select_kernel
from hf_fpdt.attention.rows import row_calls
from hf_fpdt.attention.spec import AttentionSpec
from hf_fpdt.engine.whole import attend_documents
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.layout.documents import Documents
from hf_fpdt.layout.spans import Block, Span
from hf_fpdt.memory.kv import KVStore
from hf_fpdt.memory.windowed_kv import WindowedKV
from tests.attention.test_kinds import SCALE, SINKS, SOFTCAP, assert_exact, gradients
from tests.helpers.packed import PACKED, PACKINGS, moved, random_lengths
from tests.helpers.stores import NO_LIMIT
from tests.helpers.support import assert_rejects, peaked_qkv

ROW = 8
# How each way of a kernel to read a row is tried; "packed" does all documents of a row in one call.
SHAPED = {
    "cpu": KERNELS["cpu"],
    "pair": replace(KERNELS["math"], row_shape="pair"),
    "prefix": replace(KERNELS["math"], row_shape="prefix"),
    "packed": PACKED,
}
LENGTHS = [*PACKINGS, *(random_lengths(seed, 40) for seed in range(10))]


@pytest.fixture
def rows_of_eight(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def select(name: str, *case: Any) -> Kernel:
        return replace(SHAPED[name], row_tokens=ROW)

    monkeypatch.setattr(hf_fpdt.engine.whole, "select_kernel", select)


def given_of(batch: int = 1) -> tuple[Tensor, ...]:
    q, k, v = peaked_qkv(batch, 40, 40, 4, 2, 16, torch.float64)
    return q, k, v, torch.tensor(SINKS, dtype=torch.float64)


def alone(documents: Documents, kind: dict[str, Any]) -> Any:
    """Each document by itself."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        parts = [x.split(documents.lengths, dim=1) for x in (q, k, v)]
        each = [reference.attention(a, b, c, sinks, scale=SCALE, **kind)[0] for a, b, c in zip(*parts, strict=True)]
        return torch.cat(each, dim=1)

    return attend


def ours(kernel: str, documents: Documents | None, kind: dict[str, Any]) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        more = {"sinks_N": sinks, "scale": SCALE, "kernel": kernel, **kind}
        return attend_whole(q, k, v, **more) if documents is None else attend_documents(q, k, v, documents, **more)

    return attend


@pytest.mark.usefixtures("rows_of_eight")
@pytest.mark.parametrize("kernel", SHAPED)
@pytest.mark.parametrize("kind", [(None, None), (9, None), (3, None), (None, SOFTCAP), (9, SOFTCAP)], ids=str)
def test_a_packed_row_is_its_documents_one_at_a_time(kernel: str, kind: tuple[Any, Any]) -> None:
    if kernel == "cpu" and kind[1]:
        pytest.skip("it has no softcap")
    named, given = dict(zip(("window", "softcap"), kind, strict=True)), given_of()
    dout = torch.randn(1, 40, 4, 16, dtype=torch.float64)
    for lengths in LENGTHS:
        documents = Documents.of_lengths(lengths)
        exact = gradients(alone(documents, named), given, dout)
        assert_exact(gradients(ours(kernel, documents, named), given, dout), exact)
        if lengths in PACKINGS[5:7]:
            others = moved(documents), moved(documents, -1), Documents.of_lengths(reversed(lengths)), None
            wrong = dict(zip(("off by one", "off by minus one", "another row's", "none"), others, strict=True))
            broken = {name: gradients(ours(kernel, each, named), given, dout) for name, each in wrong.items()}
            assert_rejects(partial(assert_exact, exact=exact), broken)


def seen_by_calls(kernel: Kernel, store: Any, row: tuple[int, int], **limits: Any) -> Tensor:
    """How often each query of the row sees each key; no call may have a query that sees none."""
    seen = torch.zeros(row[1] - row[0], 40, dtype=torch.long)
    queries = torch.arange(*row)[:, None]
    window = limits.get("window")
    reach = window if window is not None and not isinstance(window, Block) else NO_LIMIT
    for part, spans in row_calls(kernel, row, 8, store, **limits):
        mine = queries[part]
        for span in spans:
            keys = torch.arange(span.start, span.stop)
            sees = torch.ones(len(mine), len(keys), dtype=torch.bool)
            if span.causal:
                assert span.stop == mine[-1] + 1, "the last query is aligned with the last key"
                owner = torch.tensor(span.cuts, dtype=torch.long)
                same = torch.bucketize(mine, owner, right=True) == torch.bucketize(keys, owner, right=True)
                sees = (keys <= mine) & (keys > mine - reach) & same
            assert bool(sees.any(1).all()), f"{span}: a query sees no key"
            seen[part, span.start : span.stop] += sees
    return seen


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("window", [None, 3, 9, Block(3), Block(9)], ids=repr)
@pytest.mark.parametrize("most_tokens", [NO_LIMIT, 12])
def test_calls_see_each_key_of_the_document_once_and_no_other(name: str, window: int | None, most_tokens: int) -> None:
    plan, kv = ChunkPlan(40, 8), torch.zeros(1, 8, 2, 4)
    for lengths, resident in itertools.product(LENGTHS, (0, 2, 5)):
        documents = Documents.of_lengths(lengths)
        store: Any = WindowedKV(plan, window) if window is not None else KVStore(plan, resident)
        store._shape, store._resident_chunks = (1, 2, 4), resident
        if window is not None:
            store.put(plan.chunks[0], kv, kv)
        for chunk in plan.chunks:
            row = (chunk.start, chunk.stop)
            reach = {"window": window, "documents": documents, "most_tokens": most_tokens}
            seen = seen_by_calls(SHAPED[name], store, row, **reach)
            expected = torch.zeros_like(seen)
            for query in range(*row):
                first = documents.start_of(query)
                if isinstance(window, Block):
                    first = query - (query - first) % window
                elif window is not None:
                    first = max(first, query - window + 1)
                expected[query - chunk.start, first : query + 1] = 1
            assert torch.equal(seen, expected), (lengths, chunk, resident)


def test_a_kernel_with_packed_calls_makes_one_a_row() -> None:
    documents, store = Documents.of_lengths([3, 25, 4, 8]), KVStore(ChunkPlan(40, 8))
    store._shape = (1, 2, 4)

    def calls(kernel: Kernel = PACKED) -> list[list[Span]]:
        return [[span for _, spans in row_calls(kernel, (24, 32), 8, store, documents=documents) for span in spans]][
            0:1
        ]

    assert calls() == [[Span(3, 32, True, (28,))]]
    assert calls(KERNELS["cpu"]) == [[Span(24, 28, True), Span(3, 24, False), Span(28, 32, True)]]
    # Streamed keys are read by the document that goes on alone; several rows are done one document at a time.
    store._resident_chunks = 1
    streamed = [Span(24, 28, True), Span(3, 8, False), Span(8, 16, False), Span(16, 24, False), Span(28, 32, True)]
    assert calls() == [streamed]
    store._resident_chunks, store._shape = 5, (2, 2, 4)
    assert calls() == [[Span(3, 28, True), Span(28, 32, True)]]


def test_packed_rows_ask_first_for_kernels_with_packed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN makes a plan for each shape, and documents have as many; it is taken where nothing else is."""
    here = ("cudnn", "flash", "math")
    served = {
        name: replace(kernel, why_not=lambda *_, name=name: None if name in here else "is not here")
        for name, kernel in KERNELS.items()
    }
    monkeypatch.setattr(table, "KERNELS", served)
    device, spec = torch.device("cpu"), replace(AttentionSpec.plain(24), scale=math.pi)
    assert select_kernel("auto", device, torch.bfloat16, spec).name == "cudnn"
    assert select_kernel("auto", device, torch.bfloat16, replace(spec, packed=True)).name == "flash"
    assert select_kernel("cudnn", device, torch.bfloat16, replace(spec, packed=True)).name == "cudnn"


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_that_are_not_the_documents_are_refused(batch: int) -> None:
    q, k, v, _ = given_of(batch)
    with pytest.raises(ValueError, match="one row of as many queries and keys"):
        attend_documents(q, k, v, Documents.of_lengths([39 if batch == 1 else 40]), scale=1.0)
