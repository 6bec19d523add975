"""Seconds from rates: held against steps that were measured, and by how they grow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_fpdt.forecast.rates import GPUS, peak_of
from hf_fpdt.forecast.seconds import step_seconds
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.plan.checkpointing import KeptLayers
from hf_fpdt.plan.operations import strict_flops
from hf_fpdt.plan.sizes import ModelSizes, StepSizes
from tests.helpers.support import assert_rejects

LLAMA_8B = ModelSizes(32, 4096, 14_336, 32, 8, 128, 128, 218_112_000)
NEOX = ModelSizes(3, 4096, 16_384, 32, 32, 128, 32, 201_375_744)
LLAMA_1B = ModelSizes(4, 2048, 8192, 32, 8, 64, 64, 60_821_504)
H100 = GPUS["h100"]


def step(model: ModelSizes, n_tokens: int, vocabulary: int, sp_size: int = 1) -> StepSizes:
    return StepSizes(model, ChunkPlan(n_tokens, 32_768, sp_size), loss_tokens=1024, vocabulary=vocabulary)


def kept(layers: int, inputs: int, outputs: int) -> KeptLayers:
    return KeptLayers(tuple(i < inputs for i in range(layers)), tuple(i < outputs for i in range(layers)))


# Steps of one H100, see docs/results/offload.md: model, tokens, vocabulary, kept, full, seconds.
MEASURED = [
    (replace(LLAMA_8B, layers=8), 2**18, 128_256, kept(8, 8, 8), False, 32.048),
    (replace(LLAMA_8B, layers=8), 2**18, 128_256, kept(8, 3, 8), False, 33.371),
    (replace(LLAMA_8B, layers=12), 2**18, 128_256, kept(12, 12, 0), False, 58.393),
    (replace(LLAMA_8B, layers=12), 2**18, 128_256, kept(12, 6, 0), False, 60.041),
    (replace(LLAMA_8B, layers=3), 2**17, 128_256, kept(3, 3, 3), False, 3.798),
    (NEOX, 2**17, 50_432, kept(3, 3, 3), False, 3.432),
    (LLAMA_1B, 2**17, 128_256, kept(4, 4, 4), True, 2.810),
]


@pytest.mark.parametrize(("model", "n_tokens", "vocabulary", "keeps", "full", "measured"), MEASURED)
def test_seconds_are_within_two_percent_of_measured_steps(
    model: ModelSizes, n_tokens: int, vocabulary: int, keeps: KeptLayers, full: bool, measured: float
) -> None:
    sizes = step(model, n_tokens, vocabulary)

    def check(seconds: float) -> None:
        assert seconds == pytest.approx(measured, rel=0.02)

    check(step_seconds(sizes, keeps, H100, full=full))
    assert_rejects(
        check,
        {
            "adapters for weights": step_seconds(sizes, keeps, H100, full=not full),
            "attention run once more": step_seconds(sizes, keeps, H100, full=full)
            + model.layers * 2 * n_tokens**2 * model.q_heads * model.head_dim / H100.attention[model.head_dim][0],
            "attention not halved": 2 * step_seconds(sizes, keeps, H100, full=full),
        },
    )


def test_strict_flops_are_those_of_the_formula() -> None:
    matrices = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)  # 218,103,808: the layer's parameters less two norms
    weights = 32 * matrices + 128_256 * 4096
    for full, factor in ((False, 4), (True, 6)):
        expected = 2**17 * (factor * weights + 6 * 32 * 2**17 * 4096)
        assert strict_flops(LLAMA_8B, 128_256, 2**17, full=full) == expected


def test_strict_flops_do_not_count_adapters_or_norms() -> None:
    adapted = replace(LLAMA_8B, layer_parameters=LLAMA_8B.layer_parameters + 1_310_720)
    counts = {strict_flops(sizes, 128_256, 2**17, full=False) for sizes in (LLAMA_8B, adapted)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("name", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-80GB", True), ("X", False)]
)
def test_the_peak_is_that_of_a_known_gpu(name: str, known: bool) -> None:
    assert peak_of(name) == (GPUS["h100" if "H100" in name else "a100-80"].peak if known else None)


def test_ranks_that_share_a_sequence_share_its_time() -> None:
    keeps = kept(32, 32, 32)
    one, four = (step_seconds(step(LLAMA_8B, 2**20, 128_256, ranks), keeps, H100, full=True) for ranks in (1, 4))
    assert four == pytest.approx(one / 4)


def test_what_is_not_kept_costs_time() -> None:
    sizes = step(LLAMA_8B, 2**18, 128_256)
    everything, rebuilt, rerun = (
        step_seconds(sizes, keeps, H100, full=False) for keeps in (kept(32, 32, 32), kept(32, 5, 32), kept(32, 32, 0))
    )
    assert everything < rebuilt < 1.07 * everything < rerun < 1.25 * everything
