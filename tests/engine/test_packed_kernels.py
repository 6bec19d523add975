"""Kernels of recurrent layers that take marks of documents: used where a layer's trial finds them right."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.qwen3_5 import modeling_qwen3_5

from hf_fpdt import apply_fpdt
from hf_fpdt.engine.trial import few_documents
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.layout.documents import Documents
from hf_fpdt.parallel.packed_scans import scan_marks
from tests.helpers.kinds import TOLERANCE, in_double
from tests.helpers.models import PLUGIN, Step, assert_same_step, tokens, train_step
from tests.helpers.packed import positions, random_lengths
from tests.helpers.recurrent import recurrent
from tests.model.test_packed import alone

IDS = tokens(1, 40)
LENGTHS = ((7, 4, 1, 1, 19, 3, 5), (8, 16, 8, 8), random_lengths(2, 40))
Scan = Callable[..., Any]
# Of each model its scan, and what the package calls it that has one with marks.
MODELS: dict[str, tuple[Any, str, str]] = {
    "qwen3_5_text": (modeling_qwen3_5, "torch_chunk_gated_delta_rule", "chunk_gated_delta_rule"),
    "bamba": (modeling_bamba, "mamba2_chunk_scan", "mamba_chunk_scan_combined"),
    "falcon_h1": (modeling_falcon_h1, "mamba2_chunk_scan", "mamba_chunk_scan_combined"),
}


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def planted(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Scan], Scan]) -> list[int]:
    """What a package's kernel would be chosen for the scan of a model: a list that grows with its calls."""
    module, function, wanted = MODELS[name]
    plain: Any = inspect.unwrap(getattr(module, function))
    kernel, calls = make(plain), list[int]()

    @wraps(kernel)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    package: Any = types.ModuleType("planted_kernels")
    path = hf_path(wanted)
    for part in reversed(path.split(".")):
        counted = types.SimpleNamespace(**{part: counted})  # type: ignore[assignment]
    vars(package).update(vars(counted))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    chosen = use_kernel_func_from_hub_with_fallback(wanted, package.__name__)(plain)
    monkeypatch.setattr(module, function, chosen)
    return calls


def hf_path(wanted: str) -> str:
    """Where transformers looks for it in a package."""
    from transformers.integrations import hub_kernels

    inner = hub_kernels._KERNELS_INTERNAL_PATH_MAPPINGS.get(wanted)
    return wanted if inner is None else f"{inner}.{wanted}"


def pieces(plain: Scan, args: tuple[Any, ...], kwargs: dict[str, Any], edges: list[int], states: list[Any]) -> Any:
    """A scan of each document by itself; their outputs together, and their states."""
    given, found = dict[Any, Any](enumerate(args)) | kwargs, []
    for start, stop, state in zip(edges[:-1], edges[1:], states, strict=True):
        part: dict[Any, Any] = {
            key: value[:, start:stop] if isinstance(value, Tensor) and value.dim() > 2 else value
            for key, value in given.items()
            if not str(key).startswith("initial_state")
        }
        name = "initial_states" if "initial_states" in kwargs else "initial_state"
        positional = [part.pop(place) for place in range(len(args))]
        found.append(plain(*positional, **part | {name: state}))
    return torch.cat([out for out, _ in found], dim=1), [state for _, state in found]


def as_fla(plain: Scan, change: Callable[[list[int]], list[int]] = list, leak: bool = False) -> Scan:
    """As flash-linear-attention's: `cu_seqlens`, with a state for each document."""

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    ) -> Any:  # fmt: skip
        options: dict[str, Any] = {
            "output_final_state": output_final_state, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        }  # fmt: skip
        if cu_seqlens is None:
            return plain(query, key, value, g, beta, initial_state=initial_state, **options)
        assert query.shape[0] == 1 and cu_seqlens[-1] == query.shape[1] and not cu_seqlens.is_inference()
        edges = change(cu_seqlens.tolist())
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        states: list[Any] = [None] * (len(edges) - 1) if initial_state is None else list(initial_state[:, None])
        states = [states[0]] * len(states) if leak else states[: len(edges) - 1]
        out, finals = pieces(plain, (query, key, value, g, beta), options | {"initial_state": None}, edges, states)
        return out, torch.cat(finals)

    return kernel


def as_mamba(plain: Scan, change: Callable[[list[int]], list[int]] = list, leak: bool = False) -> Scan:
    """As mamba-ssm's: `seq_idx`, and a state that reaches the document of number 0."""

    def kernel(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: Any = None, return_final_states: bool = False,
    ) -> Any:  # fmt: skip
        options = {
            "D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size,
            "return_final_states": return_final_states,
        }  # fmt: skip
        assert cu_seqlens is None
        if seq_idx is None:
            return plain(x, dt, A, B, C, initial_states=initial_states, **options)
        assert seq_idx.shape == x.shape[:2] and seq_idx.dtype == torch.int32 and seq_idx[0, 0] == 0
        edges = [0, *(seq_idx[0].diff().nonzero().view(-1) + 1).tolist(), x.shape[1]]
        edges = change(edges)
        states = [initial_states if number == 0 or leak else None for number in range(len(edges) - 1)]
        out, finals = pieces(plain, (x, dt, A, B, C), options | {"initial_states": None}, edges, states)
        return out, finals[-1]

    return kernel


MAKERS = {"qwen3_5_text": as_fla, "bamba": as_mamba, "falcon_h1": as_mamba}


def late(edges: list[int]) -> list[int]:
    """Every document begins one token late."""
    return sorted({0, edges[-1], *(edge + 1 for edge in edges[1:-1] if edge + 1 < edges[-1])})


def step(model: Any, documents: Documents) -> Step:
    """On one packed row; the first one tries the layers."""
    model.zero_grad()
    return train_step(model, IDS, num_items_in_batch=1, position_ids=positions(documents))


def ways_of(model: Any) -> set[str]:
    return {layer._fpdt_traits.by_documents for layer in model.model.layers if layer._fpdt_traits.states}


@pytest.mark.parametrize("name", MODELS)
def test_a_chunk_is_one_call_of_a_kernel_that_takes_marks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = planted(monkeypatch, name, MAKERS[name])
    model = recurrent(name)
    layers = sum(kind != "full_attention" for kind in model.config.layer_types) if name == "qwen3_5_text" else None
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    step(applied, Documents.of_lengths(LENGTHS[0]))
    assert ways_of(applied) == {"marks"}
    for lengths in LENGTHS:
        documents = Documents.of_lengths(lengths)
        truth = alone(copy.deepcopy(model), documents)
        calls.clear()
        assert_same_step(step(applied, documents), truth, TOLERANCE)
        assert layers is None or len(calls) == layers * 2 * 5, "five chunks, forward and backward"


@pytest.mark.parametrize("bug", ["marks are ignored", "a token late", "the first state for all", "marks fail"])
@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba"])
def test_a_kernel_whose_marks_are_wrong_is_called_for_each_document(
    name: str, bug: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and exact."""

    def failing(edges: list[int]) -> list[int]:
        raise RuntimeError("seq_idx is only supported for channel last layout")

    changes: dict[str, dict[str, Any]] = {
        "marks are ignored": {"change": lambda edges: [0, edges[-1]]},
        "a token late": {"change": late},
        "the first state for all": {"leak": True},
        "marks fail": {"change": failing},
    }
    planted(monkeypatch, name, lambda plain: MAKERS[name](plain, **changes[bug]))
    model = recurrent(name)
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    for lengths in LENGTHS[:2]:
        documents = Documents.of_lengths(lengths)
        assert_same_step(step(applied, documents), alone(model, documents), TOLERANCE)
        model.zero_grad()
    assert ways_of(applied) == {"scans"}
    assert sum("do not run by marks of documents" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("name", MODELS)
def test_pytorchs_own_scans_take_no_marks(name: str) -> None:
    """Transformers refuses marks before them, or drops them: they are not even tried."""
    module, function, _ = MODELS[name]
    assert scan_marks(getattr(module, function)) is None
    model = recurrent(name)
    apply_fpdt(model, PLUGIN)
    step(model, Documents.of_lengths(LENGTHS[0]))
    assert ways_of(model) == {"scans"}


@pytest.mark.parametrize(("n_tokens", "chunk"), [(6, 4), (7, 5), (48, 32), (384, 256)])
def test_a_document_of_a_trial_goes_over_its_border(n_tokens: int, chunk: int) -> None:
    documents = few_documents(ChunkPlan(n_tokens, chunk))
    assert documents.start_of(chunk) < chunk < documents.starts[-1]
    assert min(documents.lengths) == 1 or min(documents.lengths) >= 64
