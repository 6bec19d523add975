"""Operations of chunks add up to those of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.plan.checkpointing import KeptLayers
from hf_fpdt.plan.operations import Work, chunk_work, pass_work, strict_flops
from tests.forecast.test_rates import LLAMA_8B, step
from tests.helpers.support import assert_rejects


def kept(inputs: str, outputs: str) -> KeptLayers:
    return KeptLayers(tuple(c == "x" for c in inputs), tuple(c == "x" for c in outputs))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("n_tokens", [2**17, 100_000])
def test_strict_work_is_that_of_the_formula_whatever_is_kept(n_tokens: int, full: bool) -> None:
    sizes = step(replace(LLAMA_8B, layers=4), n_tokens, 0)
    expected = strict_flops(sizes.model, 0, n_tokens, full=full)

    def check(work: Work) -> None:
        assert work.strict == pytest.approx(expected, rel=1e-9)

    for keeps in (kept("xxxx", "xxxx"), kept("xooo", "xxxx"), kept("xoxo", "ooxx"), kept("xxxx", "oooo")):
        check(pass_work(sizes, keeps, full=full))
    assert_rejects(check, {"all that is done": replace(pass_work(sizes, keeps, full=full), strict=2 * expected)})


def test_what_is_not_kept_is_done_again_once() -> None:
    sizes = step(replace(LLAMA_8B, layers=4), 2**17, 0)
    everything = pass_work(sizes, kept("xxxx", "xxxx"), full=False).done
    linear = 2.0 * 2**17 * LLAMA_8B.linear_weights
    attention = 2.0 * 2**34 * 4096
    for keeps, linears, attentions in (
        (kept("xxxx", "oooo"), 0, 4),
        (kept("xooo", "xxxx"), 3, 0),
        (kept("xoxo", "oooo"), 2, 4),
        (kept("xxoo", "oxox"), 2, 2),
    ):
        done = pass_work(sizes, keeps, full=False).done
        assert done == pytest.approx(everything + linears * linear + attentions * attention)


def test_ranks_share_the_work() -> None:
    one, four = (step(LLAMA_8B, 2**18, 0, ranks) for ranks in (1, 4))
    keeps = KeptLayers((True,) * 32, (True,) * 32)
    assert pass_work(four, keeps, full=True).done == pytest.approx(pass_work(one, keeps, full=True).done / 4)
    chunk = ChunkPlan(2**18, 32_768).chunks[3]
    later, earlier = (chunk_work(one, c, "forward", attends=True, full=True).done for c in (chunk, one.plan.chunks[0]))
    assert later > earlier, "a later chunk reads more keys"
