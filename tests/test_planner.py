"""The planner's collectives are those that a real training step makes, call by call and byte by byte."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt, planner
from hf_fpdt.planner import Collectives, StepPlan
from tests.support import assert_rejects, spawn
from tests.test_sequence_parallel import sample, stacked
from tests.truth import in_double, tiny

COUNTED = ("all_to_all_single", "all_reduce")
# Whatever else could move data between ranks must not be called.
OTHERS = (
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
    "send",
)
OTHERS += ("all_gather_object", "broadcast_object_list", "reduce", "gather", "scatter", "recv", "isend", "irecv")


@dataclass
class Counted:
    """Bytes sent in each all-to-all and size of each tensor all-reduced, in order."""

    sent: list[int] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)


@contextmanager
def counting(counted: Counted) -> Iterator[None]:
    saved = {name: getattr(dist, name) for name in COUNTED + OTHERS}

    def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert output.shape == input.shape
        ranks = dist.get_world_size(kwargs["group"])
        counted.sent.append(input.numel() * input.element_size() * (ranks - 1) // ranks)
        return saved["all_to_all_single"](output, input, *args, **kwargs)

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.reduced.append(tensor.numel() * tensor.element_size())
        return saved["all_reduce"](tensor, *args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective that the planner does not know")

    ours = {"all_to_all_single": all_to_all_single, "all_reduce": all_reduce, **dict.fromkeys(OTHERS, refuse)}
    for name, function in ours.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(dist, name, function)


@dataclass(frozen=True)
class Case:
    family: str
    plan: StepPlan
    checkpoints: str = "attention"
    dtype: torch.dtype = torch.float64


def plan(sp_size: int, n_tokens: int, kv_heads: int = 2, **more: Any) -> StepPlan:
    sizes = {"chunk_tokens": 24, "layers": 2, "q_heads": 12, "head_dim": 8, "element_bytes": 8}
    return StepPlan(**{**sizes, "sp_size": sp_size, "n_tokens": n_tokens, "kv_heads": kv_heads, **more})


CASES = [
    Case("llama", plan(2, 64)),
    Case("llama", plan(2, 63), "input"),
    Case("llama", plan(2, 24, 1)),
    Case("llama", plan(2, 1, 3)),
    Case("llama", plan(2, 49, 4, batch=3), "input"),
    Case("llama", plan(2, 60, layers=1, mean_of_labels=False)),
    Case("llama", plan(2, 60, 12, element_bytes=4), dtype=torch.float32),
    Case("llama", plan(2, 60, 6, element_bytes=2), "input", dtype=torch.bfloat16),
    Case("neox", plan(2, 50, 12)),
]
WIDER = [Case("llama", plan(3, 100, kv_heads), policy) for kv_heads in (1, 2, 4) for policy in ("attention", "input")]
WIDER += [Case("neox-sequential", plan(3, 71, 12, chunk_tokens=9))]


def counted_step(case: Case, rank: int) -> tuple[Counted, Counted]:
    """What the forward and the backward pass of a real step do."""
    step = case.plan
    heads = {"num_attention_heads": step.q_heads, "hidden_size": step.q_heads * step.head_dim}
    if case.family == "llama":
        heads["num_key_value_heads"] = step.kv_heads
    model = tiny(case.family, num_hidden_layers=step.layers, **heads).to(case.dtype)
    model = in_double(model) if case.dtype == torch.float64 else model
    settings = FPDTPlugin(chunk_tokens=step.chunk_tokens, sp_size=step.sp_size, checkpoints=case.checkpoints)
    apply_fpdt(model, settings)
    collator = ShardingCollator(stacked, step.sp_size, rank % step.sp_size, step.chunk_tokens)
    features = [sample(index, max(step.n_tokens, 2)) for index in range(step.batch)]
    if step.n_tokens == 1:
        features = [{name: value[:1] for name, value in feature.items()} for feature in features]
    batch = collator(features)
    forward, backward = Counted(), Counted()
    items = {} if step.mean_of_labels else {"num_items_in_batch": torch.tensor(7)}
    with counting(forward):
        loss = model(**batch, **items).loss
    with counting(backward):
        loss.backward()
    return forward, backward


def assert_planned(step: StepPlan, forward: Counted, backward: Counted) -> None:
    sent_forward = [exchange.sent_bytes for exchange in step.layer_forward()]
    sent_backward = [exchange.sent_bytes for exchange in step.layer_backward()]
    assert forward.sent == sent_forward * step.layers
    assert backward.sent == sent_backward * step.layers
    assert not backward.reduced
    outside = step.outside_layers()
    assert (len(forward.reduced), sum(forward.reduced)) == (outside.reductions, outside.reduced_bytes)
    sent = [*forward.sent, *backward.sent]
    counted = Collectives(len(sent), sum(sent), len(forward.reduced), sum(forward.reduced))
    assert counted == step.step() == outside + step.layers_forward() + step.layers_backward()


def _steps(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        counted = counted_step(case, rank)
        assert_planned(case.plan, *counted)
        wrong = {
            "another chunk size": {"chunk_tokens": case.plan.chunk_tokens * 4},
            "a layer more": {"layers": case.plan.layers + 1},
            "bytes of another dtype": {"element_bytes": 1},
            "labels counted or not": {"mean_of_labels": not case.plan.mean_of_labels},
            "a longer sequence": {"n_tokens": case.plan.n_tokens + case.plan.sp_size},
            "more key/value heads": {"kv_heads": case.plan.kv_heads * 7},
        }
        if case.plan.n_tokens <= case.plan.chunk_tokens:
            del wrong["another chunk size"]
        variants = {name: replace(case.plan, **change) for name, change in wrong.items()}
        assert_rejects(lambda step, counted=counted: assert_planned(step, *counted), variants)


def test_two_ranks_make_the_planned_collectives() -> None:
    spawn(_steps, 2, CASES)


def test_three_ranks_make_the_planned_collectives() -> None:
    spawn(_steps, 3, WIDER)


def test_groups_beside_each_other_make_those_of_one() -> None:
    spawn(_steps, 4, CASES[:2])


def test_one_rank_makes_none() -> None:
    step = plan(1, 64)
    assert step.step() == Collectives() and not step.layer_forward() and not step.layer_backward()
    with counting(counted := Counted()):
        model = tiny("llama")
        apply_fpdt(model, FPDTPlugin(chunk_tokens=24))
        model(**stacked([sample(0, 64)])).loss.backward()
    assert counted == Counted()


def test_exchanges_are_named_by_chunk() -> None:
    step = plan(2, 60)
    forward = [(exchange.chunk, exchange.tensors) for exchange in step.layer_forward()]
    assert forward == [(chunk, what) for chunk in range(3) for what in ("q k v", "out")]
    backward = [(exchange.chunk, exchange.tensors) for exchange in step.layer_backward()]
    assert backward[:3] == [(0, "k v"), (1, "k v"), (2, "q k v")] and backward[-1] == (0, "dq dk dv")
    assert len(backward) == 2 + 4 * 3


def test_a_known_size() -> None:
    """Llama-3.1-8B, 1M tokens over 4 ranks in chunks of 32K, bf16: by hand."""
    step = StepPlan(n_tokens=2**20, chunk_tokens=2**15, sp_size=4, layers=32, q_heads=32, kv_heads=8, head_dim=128)
    token_heads = 2**20 // 4 * 128 * 2 * 3 // 4  # bytes sent of one head of this rank's tokens
    assert step.layers_forward() == Collectives(32 * 32 * 2, 32 * token_heads * (32 + 16 + 32))
    # k v once more, q, out, dout, dq dk dv
    assert step.layers_backward().sent_bytes == 32 * token_heads * (16 + 32 + 32 + 32 + 48)
    assert step.layers_backward().exchanges == 32 * (31 + 4 * 32)
    frozen = replace(step, backward_layers=31)
    assert frozen.layers_backward() * 32 == step.layers_backward() * 31


@pytest.mark.parametrize(
    ("changes", "message"), [({"q_heads": 10}, "q_heads=10"), ({"chunk_tokens": 25}, "chunk_tokens=25")]
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan(3, 60), **changes)


def test_it_needs_no_torch() -> None:
    tree = ast.parse(Path(planner.__file__).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert set(imported) <= {"__future__", "collections.abc", "dataclasses", "functools", "layout", "config"}
    assert set(plain) <= {"math"}
