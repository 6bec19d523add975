"""Packed rows through recurrent layers: loss and every gradient are those of documents one at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import hf_fpdt.engine.recurrent
import hf_fpdt.engine.trial
import hf_fpdt.model.layers
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.layout.documents import Documents
from hf_fpdt.parallel.packed_scans import ChunkDocuments
from tests.helpers.kinds import TOLERANCE, in_double, with_adapters
from tests.helpers.models import CHUNK, PLUGIN, Step, assert_same_step, tokens, train_step
from tests.helpers.packed import PACKINGS, moved, positions, random_lengths
from tests.helpers.recurrent import FAMILIES, CutOff, Forgets, cache, recurrent
from tests.helpers.support import assert_rejects
from tests.model.test_packed import alone

IDS = tokens(1, 40)
HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 1}


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def applied(model: nn.Module, plugin: FPDTPlugin = PLUGIN) -> nn.Module:
    model = copy.deepcopy(model)
    apply_fpdt(model, plugin)
    return model


def packed(model: nn.Module, documents: Documents) -> Step:
    """A step of a model that FPDT was applied to, on one packed row."""
    model.zero_grad()
    return train_step(model, IDS, num_items_in_batch=1, position_ids=positions(documents))


def assert_exact(step: Step, truth: Step) -> None:
    assert_same_step(step, truth, TOLERANCE)


# Of its documents one begins just before the border of a chunk of 8 and goes on, another one begins at a border.
HARD = (7, 4, 1, 1, 19, 3, 5)
ROWS = (HARD, PACKINGS[4], random_lengths(1, 40))
# What may leak is looked at in one family of each kind of mixer.
BROKEN = ("qwen3_5_text", "kimi_linear", "falcon_h1", "lfm2")


# The mixers of qwen3_5_moe_text are those of qwen3_5_text.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3_5_moe_text"])
def test_recurrent_layers_start_afresh_at_each_document(name: str) -> None:
    """Of length 1, ending on borders of chunks, longer than several; beside attention in one layer (Falcon-H1) too."""
    model = recurrent(name)
    ours = applied(model)
    for lengths in ROWS:
        documents = Documents.of_lengths(lengths)
        assert_exact(packed(ours, documents), alone(model, documents))
    if name in BROKEN:
        assert_nothing_leaks(ours, model, scans=name != "lfm2")


def assert_nothing_leaks(ours: nn.Module, model: nn.Module, *, scans: bool) -> None:
    """What would let documents see one another is rejected."""
    documents = Documents.of_lengths(HARD)
    truth, broken = alone(model, documents), {}
    for what, each in {"off by one": moved(documents), "none": Documents((0,), 40)}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_fpdt.model.layers, "documents_of_batch", lambda each=each: each)
            broken[what] = packed(ours, documents)
    for bug in (Forgets, CutOff):
        with cache(bug):
            broken[bug.__name__] = packed(ours, documents)
    for what in LEAKS if scans else ("inputs before the chunk", "convolutions"):
        with leaking(what):
            broken[f"leaking {what}"] = packed(ours, documents)
    assert_rejects(lambda step: assert_exact(step, truth), broken)


LEAKS: Mapping[str, tuple[Any, str, Callable[..., Any]]] = {
    "states": (ChunkDocuments, "goes_on", property(lambda self: self.chunk.start > 0)),  # type: ignore[dict-item]
    "inputs before the chunk": (ChunkDocuments, "without_others", lambda self, inputs, before_own: inputs),
    "convolutions": (hf_fpdt.engine.recurrent, "convolution_of_documents", lambda convolve, part: convolve),
    "scans": (hf_fpdt.engine.recurrent, "scan_of_documents", lambda scan, part, marked: scan),
}


@contextmanager
def leaking(what: str) -> Iterator[None]:
    """Inside, something goes over the start of a document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*LEAKS[what])
        yield


@pytest.mark.parametrize(("checkpoints", "place"), [("attention", HOST), ("input", {}), ("segment", HOST)], ids=str)
@pytest.mark.parametrize("name", ["qwen3_5_text", "nemotron_h", "falcon_h1"])
def test_checkpoints_of_packed_rows_are_exact(name: str, checkpoints: str, place: dict[str, Any]) -> None:
    more: dict[str, Any] = {"num_hidden_layers": 4}
    if name == "qwen3_5_text":
        more["layer_types"] = ["linear_attention", "full_attention"] * 2
    if name == "nemotron_h":
        more["layers_block_type"] = ["linear_attention", "moe", "full_attention", "linear_attention"]
    model: nn.Module = recurrent(name, **more)
    model = with_adapters(model) if place else model
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints, **place)
    documents = Documents.of_lengths(random_lengths(9, 40))
    assert_exact(packed(applied(model, plugin), documents), alone(model, documents))


# -- layers whose scans cannot be stopped where a document begins -----------------------------------------------------


def by_layer(patch: pytest.MonkeyPatch) -> None:
    """As if convolutions of a layer's own had been seen in its trial."""
    patch.setattr(hf_fpdt.engine.recurrent, "_is_convolution", lambda function: False)


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "lfm2"])
def test_layers_that_hide_their_convolutions_run_document_by_document(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their trial finds it, they are exact all the same, and it is said once."""
    by_layer(monkeypatch)
    model = recurrent(name)
    ours: Any = applied(model)
    for lengths in (PACKINGS[4], HARD):
        documents = Documents.of_lengths(lengths)
        assert_exact(packed(ours, documents), alone(model, documents))
    assert ours.model.layers[0]._fpdt_traits.by_documents == "layer"
    assert sum("packed rows run with one document of a chunk after another" in text for text in caplog.messages) == 1
    assert_exact(padded(ours), padded(model))


def padded(model: nn.Module) -> Step:
    """A step of two rows, one of them padded."""
    model.zero_grad()
    ids, mask = tokens(2, 23), torch.arange(23).lt(torch.tensor([[23], [9]])).long()
    return train_step(model, ids, ids.masked_fill(mask == 0, -100), attention_mask=mask)


def test_such_a_layer_with_attention_in_it_refuses_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    by_layer(monkeypatch)
    ours = applied(recurrent("falcon_h1"))
    with pytest.raises(NotImplementedError, match="does not take a packed row of 7 documents: .* attention cannot"):
        packed(ours, Documents.of_lengths(PACKINGS[6]))
    assert_exact(padded(ours), padded(recurrent("falcon_h1")))


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_padding_goes_through_no_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two lengths become one row of their documents, which their layers take."""
    model, widths = recurrent(name), []
    ours: Any = applied(model)
    for layer in ours.model.layers:
        layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:2]))
    assert_exact(padded(ours), padded(model))
    assert set(widths) == {(1, 23 + 9)}
