"""Whole attention as an autograd function, and the merge of its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import hf_fpdt.engine.whole
from hf_fpdt import attend_whole
from hf_fpdt.attention import reference
from hf_fpdt.attention.kernels.contract import MAX_ELEMENTS
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.attention.online import merge
from hf_fpdt.attention.rows import kernel_spans
from hf_fpdt.layout.spans import Span
from hf_fpdt.memory.kv import KVStore
from tests.helpers.support import assert_rejects, peaked_qkv, relative_error


def gradients(attend: object, qkv: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("kernel", ["math", "cpu"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(63, 63), (400, 400), (1, 50), (37, 100), (150, 400)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_whole_attention_is_exact_in_rows(
    kernel: str, q_len: int, kv_len: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last query is aligned with the last key; rows of 128 queries make several of them."""
    small_rows = dataclasses.replace(KERNELS[kernel], row_tokens=128)
    monkeypatch.setattr(hf_fpdt.engine.whole, "select_kernel", lambda *_: small_rows)
    qkv = peaked_qkv(2, q_len, kv_len, *heads, 16, torch.float64)
    dout = torch.randn_like(qkv[0])
    ours = gradients(lambda *x: attend_whole(*x, scale=0.25), qkv, dout)
    exact = gradients(lambda *x: reference.attention(*x, scale=0.25)[0], qkv, dout)

    def check(results: list[Tensor]) -> None:
        for a, b in zip(results, exact, strict=True):
            assert relative_error(a, b) < 1e-12

    check(ours)
    assert_rejects(
        check,
        {
            "scale": gradients(lambda *x: attend_whole(*x, scale=0.2), qkv, dout),
            "first key dropped": gradients(lambda q, k, v: attend_whole(q, k, v * keep(v), scale=0.25), qkv, dout),
        },
    )


def keep(v_BTGH: Tensor) -> Tensor:
    """1 everywhere but at the first key."""
    kept = torch.ones_like(v_BTGH)
    kept[:, 0] = 0
    return kept


def test_merge_is_stable_where_one_part_outweighs_the_other() -> None:
    """A gap of 200 between the two lse would overflow a merge that does not subtract the maximum."""
    out_a, out_b = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    lse_a, lse_b = torch.full((1, 1, 1), 200.0), torch.full((1, 1, 1), 0.0)
    out, lse = merge((out_a, lse_a), (out_b, lse_b))
    assert torch.equal(out, out_a) and lse.item() == 200.0
    out, lse = merge((out_a, -lse_a), (out_b, lse_b))
    assert torch.equal(out, out_b) and lse.item() < 1e-80


@pytest.mark.parametrize(
    "shapes",
    [((1, 8, 4, 16), (1, 4, 4, 16)), ((1, 4, 4, 16), (1, 4, 3, 16)), ((2, 4, 4, 16), (1, 4, 4, 16))],
    ids=["more queries than keys", "heads do not divide", "batch differs"],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="query heads a multiple"):
        attend_whole(q, k, k, scale=1.0)


def test_no_call_sees_more_elements_than_kernels_can_index() -> None:
    """2 million keys of 8 heads × 128 are past 2**31 elements: the row is cut, and nothing is left out."""
    stop = 2**21 + 2**15
    k = torch.empty(1, stop, 8, 128, device="meta")
    diagonal, *full = kernel_spans(KERNELS["flash"], (stop - 2**15, stop), 2**15, KVStore.holding(k, k))
    assert diagonal == Span(stop - 2**15, stop, True) and len(full) > 1
    assert all((span.stop - span.start) * 8 * 128 <= MAX_ELEMENTS for span in full)
    assert [s.start for s in full] == [0, *(s.stop for s in full[:-1])] and full[-1].stop == diagonal.start


def test_frozen_inputs_get_no_gradient_and_cost_nothing_wrong() -> None:
    q, k, v = peaked_qkv(1, 20, 20, 2, 2, 8, torch.float64)
    q.requires_grad_()
    attend_whole(q, k, v, scale=0.3).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None
