"""Recurrent layers over the kernels of their packages, in chunks: as accurate as the whole over the same kernels.

Loss and every gradient may be twice as far from float64, by transformers' PyTorch path, as the same model's are that
takes the whole sequence at once in bfloat16: flash-linear-attention's gated delta rule and KDA, mamba-ssm's scan,
causal-conv1d. The same test runs on a CPU, where all of them are PyTorch's, on smaller models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import LOSS, Tensors, worst_of_run
from hf_fpdt.engine.recurrent import plain_kernels, scan_packages
from tests.helpers.kinds import in_double
from tests.helpers.models import tokens
from tests.helpers.recurrent import FAMILIES, CutOff, Forgets, cache, recurrent

# The last chunk is no multiple of the blocks of any kernel, but of 16, for which kernels are compiled once.
TOKENS, CHUNK = 3536, 1024
FEW_TOKENS, SHORT_CHUNK = 90, 32
WIDE: Mapping[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
_DELTA: Mapping[str, Any] = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
# The same heads in all of them, so that kernels are tuned once. One group, as large ones have: of several mamba-ssm's
# fused whole has a norm each, and transformers' PyTorch path one over all of them, but for Nemotron-H.
_MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 128, "mamba_n_groups": 1,
}  # fmt: skip
# Of each family the packages that must be there, and the heads that their kernels take. Not Mamba-2 itself: to import
# flash-linear-attention registers a model of its own under that name.
KERNELS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "qwen3_5_text": (("fla",), _DELTA),
    "kimi_linear": (
        ("fla",),
        {"linear_head_dim": 64, "linear_num_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64},
    ),
    "bamba": (("mamba_ssm", "causal_conv1d"), _MAMBA),
    "falcon_h1": (("mamba_ssm", "causal_conv1d"), {**_MAMBA, "mamba_d_ssm": 512}),
    "nemotron_h": (
        ("mamba_ssm", "causal_conv1d"),
        {
            "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "chunk_size": 128,
            # Every token visits every expert: otherwise rounding sends some elsewhere.
            "num_experts_per_tok": 4,
        },
    ),
}  # fmt: skip
CASES = [
    *(pytest.param("cpu", name, id=f"cpu-{name}") for name in ("qwen3_5_text", "kimi_linear", "bamba", "nemotron_h")),
    *(pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in KERNELS),
]


def model_of(name: str, device: str) -> Any:
    """A float64 model on the CPU whose weights are exact in bfloat16."""
    if name not in FAMILIES:
        pytest.skip(f"this transformers has no {name}")
    packages, heads = KERNELS[name]
    if device == "cuda":
        for package in packages:
            pytest.importorskip(package)
    experts = {"num_experts_per_tok": 4} if name == "nemotron_h" else {}
    model = recurrent(name, **(experts if device == "cpu" else {**WIDE, **heads}))
    # Weights are drawn for models of width 32.
    gain = (32 / model.config.hidden_size) ** 0.5
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * (gain if weight.dim() == 2 else 1)).bfloat16())
    if device == "cuda":
        assert set(scan_packages(model).values()) == {packages[0]}, scan_packages(model)
    return model


def a_step(model: nn.Module, ids: torch.Tensor) -> Tensors:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {LOSS: loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, a float64 model is that throughout, by PyTorch's path."""
    with in_double(), plain_kernels(model):
        yield


@pytest.mark.parametrize(("device", "name"), CASES)
def test_chunks_over_kernels_are_as_accurate_as_the_whole(device: str, name: str) -> None:
    on_gpu = device == "cuda"
    ids = tokens(1, TOKENS if on_gpu else FEW_TOKENS).to(device)
    true = model_of(name, device).to(device)
    with exact(true):
        truth = a_step(true, ids)
    model = copy.deepcopy(true).bfloat16()
    del true
    plain = a_step(copy.deepcopy(model), ids)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK if on_gpu else SHORT_CHUNK, fused=False))
    found = worst_of_run(a_step(model, ids), plain, truth)
    print(f"{name} on {device}: {found.ratio:.2f} ({found.name})")
    assert found.passed, found
    for bug in (Forgets, CutOff):
        with cache(bug):
            broken = worst_of_run(a_step(model, ids), plain, truth)
        print(f"{name} on {device}, {bug.__name__}: {broken.ratio:.2f} ({broken.name})")
        assert not broken.passed, f"{bug.__name__} passes: {broken}"
