"""flash-linear-attention's own kernels on packed rows: one call a chunk, as accurate as one document at a time.

Loss and every gradient may be twice as far from fp32, by transformers' PyTorch path, as the same kernels are that are
given one document after another in bfloat16.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import hf_fpdt.engine.recurrent
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import LOSS, Tensors, worst_of_run
from hf_fpdt.engine.recurrent import plain_kernels, takes_marks
from hf_fpdt.layout.documents import Documents
from tests.helpers.models import tokens
from tests.helpers.packed import positions
from tests.helpers.recurrent import recurrent

pytest.importorskip("fla")
pytestmark = pytest.mark.gpu
DEVICE, CHUNK = "cuda", 512
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
# One begins just before the border of a chunk, one at a border, many are short, one is longer than several chunks.
DOCUMENTS = Documents.of_lengths((510, 2, 512, 1100, 3, 1, 70, 90, 200, 72))
IDS = tokens(1, DOCUMENTS.n_tokens)


def model_of() -> Any:
    model = recurrent("qwen3_5_text", **SIZES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


def gradients(model: Any, loss: torch.Tensor) -> Tensors:
    return {LOSS: loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(dtype: torch.dtype, *, plain: bool) -> Tensors:
    """Documents one at a time, through a model without FPDT."""
    model, losses = model_of().to(DEVICE, dtype), []
    with plain_kernels(model) if plain else nullcontext():
        for ids in IDS.to(DEVICE).split(DOCUMENTS.lengths, dim=1):
            if ids.shape[1] > 1:
                losses.append(model(input_ids=ids, labels=ids, num_items_in_batch=1).loss)
                losses[-1].backward()
    return gradients(model, torch.stack([loss.detach() for loss in losses]).sum())


def packed(model: Any) -> Tensors:
    model.zero_grad()
    ids, places = IDS.to(DEVICE), positions(DOCUMENTS).to(DEVICE)
    loss = model(input_ids=ids, labels=ids, position_ids=places, num_items_in_batch=1).loss
    loss.backward()
    return gradients(model, loss)


def test_marked_chunks_are_as_accurate_as_documents_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, plain = alone(torch.float32, plain=True), alone(torch.bfloat16, plain=False)
    model = copy.deepcopy(model_of()).to(DEVICE, torch.bfloat16)
    assert takes_marks(model.model.layers[0])
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    found = worst_of_run(packed(model), plain, truth)
    assert {each._fpdt_traits.by_documents for each in model.model.layers if each._fpdt_traits.states} == {"marks"}
    print(f"marked: {found.ratio:.2f} ({found.name})")
    assert found.passed, found
    monkeypatch.setattr(hf_fpdt.engine.recurrent, "scan_of_documents", lambda scan, part, marked: scan)
    leaking = worst_of_run(packed(model), plain, truth)
    print(f"states go over boundaries: {leaking.ratio:.2f} ({leaking.name})")
    assert not leaking.passed, "scans over boundaries pass"
