"""The planner's collectives are those that a real training step makes, call by call and byte by byte."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt
from hf_fpdt.forecast import collectives as planner
from hf_fpdt.forecast.collectives import Collectives, Exchange, StepCollectives
from hf_fpdt.forecast.seconds import ulysses
from hf_fpdt.model.apply import applied_settings
from hf_fpdt.plan.checkpointing import KeptLayers
from hf_fpdt.plan.sizes import StepSizes
from tests.helpers.support import assert_rejects, spawn
from tests.helpers.truth import in_double, tiny
from tests.parallel.test_sequence_parallel import sample, stacked

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
    *("all_gather_object", "broadcast_object_list", "reduce", "gather", "scatter", "recv", "isend", "irecv"),
)


@dataclass
class Counted:
    """Bytes sent in each all-to-all and size of each tensor all-reduced, in order."""

    sent: list[int] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)
    kept: KeptLayers | None = None  # what the step's plan said
    sizes: StepSizes | None = None


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
    plan: StepCollectives
    checkpoints: str = "attention"
    dtype: torch.dtype = torch.float64
    trained: str = "."  # pattern of the parameters that train
    inputs_held: int | None = None  # memory for so many layers' inputs, and for all attention outputs


def plan(sp_size: int, n_tokens: int, kv_heads: int = 2, **more: Any) -> StepCollectives:
    sizes = {"chunk_tokens": 24, "layers": 2, "q_heads": 12, "head_dim": 8, "element_bytes": 8}
    return StepCollectives(**{**sizes, "sp_size": sp_size, "n_tokens": n_tokens, "kv_heads": kv_heads, **more})


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
    Case("llama", plan(2, 50, layers=3, frozen_attentions=1), trained=r"\.mlp\."),
    Case("llama", plan(2, 50, layers=3, backward_layers=2), trained=r"layers\.[12]\.self_attn"),
    Case("llama", plan(2, 50, layers=3, backward_layers=1, frozen_attentions=1), trained=r"layers\.2\.mlp"),
    Case("llama", plan(2, 50, backward_layers=0), trained="lm_head"),
]
REBUILT = [
    Case("llama", plan(2, 64, layers=6), "segment"),
    Case("neox", plan(2, 50, 12, layers=6, batch=2), "segment"),
    Case("llama", plan(2, 20, layers=6), "segment"),
    Case("llama", plan(2, 64, layers=6), inputs_held=3),
    Case("llama", plan(2, 64, layers=6, backward_layers=5), "segment", trained=r"layers\.[1-5]\.self_attn"),
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
    if case.inputs_held is not None:
        settings = replace(settings, device_budget_gib=device_bytes(model, settings, case) / 2**30, host_budget_gib=0)
    handle = apply_fpdt(model, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(case.trained, name) is not None)
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
    backward.kept = next((told.kept for told in handle.store.plans.values()), None)
    backward.sizes = sizes_of(model, case)
    return forward, backward


def sizes_of(model: Any, case: Case) -> StepSizes:
    """Of a step of a model with FPDT."""
    found, step = applied_settings(model), case.plan
    assert found is not None
    own = -(-step.n_tokens // step.sp_size)
    return found.step(torch.empty(step.batch, own, found.sizes.hidden, dtype=case.dtype))


def device_bytes(model: Any, settings: FPDTPlugin, case: Case) -> int:
    """K, V of a layer, the inputs of `inputs_held` layers and every attention output."""
    handle, step = apply_fpdt(model, settings), case.plan
    sizes = sizes_of(model, case)
    handle.remove()
    layer = sizes.layer_bytes()
    kept = (case.inputs_held or 0) * layer.input_total + step.layers * layer.attention_total
    return sizes.kv_bytes(2**62).device_bytes + kept


def assert_planned(step: StepCollectives, forward: Counted, backward: Counted) -> None:
    sent_forward = [exchange.sent_bytes for exchange in step.layer_forward()]
    trained = (step.layers if step.backward_layers is None else step.backward_layers) - step.frozen_attentions
    lowest = [False] * step.frozen_attentions  # the last to be reached
    backwards = list(backward_order(step, [True] * trained + lowest, backward.kept))
    assert forward.sent == sent_forward * step.layers
    assert backward.sent == [exchange.sent_bytes for exchanges in backwards for exchange in exchanges]
    assert not backward.reduced
    outside = step.outside_layers()
    reduced = outside + step.first_pass()
    assert (len(forward.reduced), sum(forward.reduced)) == (reduced.reductions, reduced.reduced_bytes)
    sent = [*forward.sent, *backward.sent]
    counted = Collectives(len(sent), sum(sent), len(forward.reduced), sum(forward.reduced))
    assert counted == step.step() + step.first_pass()
    assert step.step() == outside + step.layers_forward() + step.layers_backward()


def backward_order(
    step: StepCollectives, into_attention: list[bool], kept: KeptLayers | None
) -> Iterator[tuple[Exchange, ...]]:
    """Layers from the last to the first, each after what is rebuilt for it."""
    there = set[int]()  # inputs and attention outputs that a rebuild made
    for above, into in enumerate(into_attention):
        layer = len(into_attention) - 1 - above
        if kept is not None and kept.inputs[layer : layer + 1] == (False,) and layer not in there:
            for below in range(kept.base(layer), layer):
                yield step.layer_rebuild(attention=not kept.attentions[below])
                there.add(below + 1)
        yield step.layer_backward(into_attention=into)


def rebuilt(kept: KeptLayers | None) -> dict[str, Any]:
    """A plan's layers that run again, and those of them whose attention does."""
    return {} if kept is None else {"rebuilt_layers": kept.rebuilt, "rebuilt_attentions": kept.rebuilt_attentions}


def assert_exchanged(forward: Counted, backward: Counted) -> None:
    """The count from a step's sizes and what it kept, as `hf-fpdt plan` makes it."""
    assert backward.sizes is not None and backward.kept is not None
    sent, told = [*forward.sent, *backward.sent], ulysses(backward.sizes, backward.kept)
    assert (told.exchanges, told.sent_bytes) == (len(sent), sum(sent))


def _steps(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        counted = counted_step(case, rank)
        case = replace(case, plan=replace(case.plan, **rebuilt(counted[1].kept)))
        assert (case.plan.rebuilt_layers > 0) == (case.checkpoints == "segment" or case.inputs_held is not None)
        assert_planned(case.plan, *counted)
        if not case.plan.frozen_attentions and counted[1].kept is not None:
            assert_exchanged(*counted)
        wrong: dict[str, dict[str, Any]] = {
            "another chunk size": {"chunk_tokens": case.plan.chunk_tokens * 4},
            "a layer more": {"layers": case.plan.layers + 1},
            "a frozen attention more": {"frozen_attentions": case.plan.frozen_attentions + 1},
            "bytes of another dtype": {"element_bytes": 1},
            "a rebuilt layer more": {"rebuilt_layers": case.plan.rebuilt_layers + 1},
            "labels counted or not": {"mean_of_labels": not case.plan.mean_of_labels},
            "a longer sequence": {"n_tokens": case.plan.n_tokens + case.plan.sp_size},
            "more key/value heads": {"kv_heads": case.plan.kv_heads * 7},
        }
        if case.plan.n_tokens <= case.plan.chunk_tokens:
            del wrong["another chunk size"]
        variants = {name: replace(case.plan, **change) for name, change in wrong.items()}
        forward, backward = counted
        assert_rejects(partial(assert_planned, forward=forward, backward=backward), variants)


def test_two_ranks_make_the_planned_collectives() -> None:
    spawn(_steps, 2, CASES)


def test_two_ranks_rebuild_as_planned() -> None:
    spawn(_steps, 2, REBUILT)


def test_the_agreement_on_budgets_is_made_once() -> None:
    spawn(_second_step, 2)


def _second_step(rank: int, world: int) -> None:
    model, step = tiny("llama"), plan(2, 64)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=24, sp_size=2))
    data = ShardingCollator(stacked, 2, rank, 24)([sample(0, 64)])
    with torch.no_grad(), counting(evaluated := Counted()):
        model(**data)
    with counting(trained := Counted()):
        model(**data).loss.backward()
    outside = step.outside_layers()
    assert sum(evaluated.reduced) == outside.reduced_bytes + step.first_pass().reduced_bytes
    assert sum(trained.reduced) == outside.reduced_bytes


def test_three_ranks_make_the_planned_collectives() -> None:
    spawn(_steps, 3, WIDER)


def test_groups_beside_each_other_make_those_of_one() -> None:
    spawn(_steps, 4, CASES[:2])


def test_one_rank_makes_none() -> None:
    step = plan(1, 64)
    assert step.step() == step.first_pass() == Collectives() and not step.layer_forward() and not step.layer_backward()
    with counting(counted := Counted()):
        model = tiny("llama")
        apply_fpdt(model, FPDTPlugin(chunk_tokens=24))
        model(**stacked([sample(0, 64)])).loss.backward()
    assert not counted.sent and not counted.reduced


def test_exchanges_are_named_by_chunk() -> None:
    step = plan(2, 60)
    forward = [(exchange.chunk, exchange.tensors) for exchange in step.layer_forward()]
    assert forward == [(chunk, what) for chunk in range(3) for what in ("q k v", "out")]
    backward = [(exchange.chunk, exchange.tensors) for exchange in step.layer_backward()]
    assert backward[:3] == [(0, "k v"), (1, "k v"), (2, "q k v")] and backward[-1] == (0, "dq dk dv")
    assert len(backward) == 2 + 4 * 3


def test_a_known_size() -> None:
    """Llama-3.1-8B, 1M tokens over 4 ranks in chunks of 32K, bf16: by hand."""
    step = StepCollectives(
        n_tokens=2**20, chunk_tokens=2**15, sp_size=4, layers=32, q_heads=32, kv_heads=8, head_dim=128
    )
    token_heads = 2**20 // 4 * 128 * 2 * 3 // 4  # bytes sent of one head of this rank's tokens
    assert step.layers_forward() == Collectives(32 * 32 * 2, 32 * token_heads * (32 + 16 + 32))
    # k v once more, q, out, dout, dq dk dv
    assert step.layers_backward().sent_bytes == 32 * token_heads * (16 + 32 + 32 + 32 + 48)
    assert step.layers_backward().exchanges == 32 * (31 + 4 * 32)
    frozen = replace(step, backward_layers=31)
    assert frozen.layers_backward() * 32 == step.layers_backward() * 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_heads": 10}, "q_heads=10"),
        ({"chunk_tokens": 25}, "chunk_tokens=25"),
        ({"rebuilt_attentions": 1}, "rebuilt_layers=0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan(3, 60), **changes)


def test_it_needs_no_torch() -> None:
    tree = ast.parse(Path(planner.__file__).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert set(imported) <= {"__future__", "collections.abc", "dataclasses", "functools", "layout", "config"}
    assert set(plain) <= {"math"}
