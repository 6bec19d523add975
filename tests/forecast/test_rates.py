"""Seconds from rates: held against steps that were measured, and by how they grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hf_fpdt.forecast.rates import GPUS, peak_of
from hf_fpdt.forecast.seconds import WINDOW_EXTRA_KEYS, step_seconds
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.plan.checkpointing import KeptLayers
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.operations import strict_flops
from hf_fpdt.plan.sizes import StepSizes
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


def test_heads_have_the_rate_of_their_width() -> None:
    rates = dict(H100.attention)
    for widths, known in {(32, 32): 64, (64, 64): 64, (96, 96): 128, (128, 128): 128, (192, 192): 256}.items():
        assert H100.attention_rates(*widths) == rates[known], widths
    assert H100.attention_rates(512, 512) == rates[256] and H100.attention_rates(192, 128) == rates[192, 128]
    a100 = GPUS["a100-80"]
    (forward, backward), (known_forward, known_backward) = a100.attention[128], rates[128]
    expected = (forward * 704e12 / known_forward, backward * 510e12 / known_backward)
    assert a100.attention_rates(192, 128) == pytest.approx(expected)


WINDOWED = [
    # Rows of 32K queries on one H100, flash-attn-4 4.0.0b36: head dimension, window, TFLOP/s forward and backward.
    (128, 4096, 615, 485),
    (128, 1024, 455, 350),
    (256, 1024, 569, 218),
    (128, 128, 109, 60),
    (64, 128, 99, 71),
]


@pytest.mark.parametrize(("head_dim", "window", "forward", "backward"), WINDOWED)
def test_windows_take_what_was_measured_within_a_third(
    head_dim: int, window: int, forward: float, backward: float
) -> None:
    """Attention's seconds alone, of a model without linears; the keys before the first query left out."""
    model = ModelSizes(1, 0, 0, 32, 8, head_dim, 1, 1, windows=(window,))

    def check(extra: tuple[float, float]) -> None:
        for measured, rate, more in zip(
            (forward, backward), H100.attention_rates(head_dim, head_dim), extra, strict=True
        ):
            assert rate * window / (window + more) / 1e12 == pytest.approx(measured, rel=0.31)

    check(WINDOW_EXTRA_KEYS)
    if window == 128:
        assert_rejects(check, {"as fast as full rows": (0, 0), "one tile": (128, 128)})
    sizes, keeps = step(model, 2**20, 0), kept(1, 1, 1)
    found = step_seconds(sizes, keeps, H100, full=False)
    seconds = [
        model.attention_forward(2**20 * (window + WINDOW_EXTRA_KEYS[0])),
        model.attention_backward(2**20 * (window + WINDOW_EXTRA_KEYS[1])),
    ]
    rates = H100.attention_rates(head_dim, head_dim)
    assert found == pytest.approx(seconds[0] / rates[0] + seconds[1] / rates[1], rel=0.01)


def test_a_step_s_seconds_are_those_of_its_layers() -> None:
    """Layers with and without a window one by one, their attention run again or not; none slower for its window."""
    mixed = replace(LLAMA_8B, layers=4, windows=(4096, None, 128, 2**16))

    def check(seconds: Callable[..., float]) -> None:
        for outs in ((True,) * 4, (True, False, False, True)):
            keeps = KeptLayers((True,) * 4, outs)
            alone = [
                seconds(
                    step(replace(LLAMA_8B, layers=1, windows=(window,)), 2**17, 0),
                    KeptLayers((True,), (out,)),
                    H100,
                    full=False,
                )
                for window, out in zip(mixed.windows, outs, strict=True)
            ]
            assert step_seconds(step(mixed, 2**17, 0), keeps, H100, full=False) == pytest.approx(sum(alone))

    check(step_seconds)
    assert_rejects(
        check,
        {
            "windows forgotten": lambda sizes, *a, **k: step_seconds(
                replace(sizes, model=replace(sizes.model, windows=())), *a, **k
            )
        },
    )
    lengths = [128, 4096, 2**15, 2**17 - 1, 2**17, None]
    times = [
        step_seconds(step(replace(LLAMA_8B, layers=1, windows=(w,)), 2**17, 0), kept(1, 1, 1), H100, full=False)
        for w in lengths
    ]
    assert times == sorted(times) and times[-1] == times[-2] == pytest.approx(times[-3], rel=0.001) != times[0]


def test_a_pass_over_the_last_layers_runs_their_attention_again() -> None:
    mixed = replace(LLAMA_8B, layers=4, windows=(None, None, 128, 128))
    sizes = step(mixed, 2**17, 0)
    last = [step_seconds(sizes, kept(2, 2, outs), H100, full=False) for outs in (2, 0)]
    first = [
        step_seconds(
            replace(sizes, model=replace(mixed, windows=mixed.windows[::-1])), kept(2, 2, outs), H100, full=False
        )
        for outs in (2, 0)
    ]
    assert last[0] == pytest.approx(first[0]) and 0 < last[1] - last[0] < (first[1] - first[0]) / 50


def test_experts_that_no_token_visits_take_no_time() -> None:
    idle = replace(LLAMA_8B, idle_width=10**6, layer_parameters=218_112_000 + 3 * 4096 * 10**6)
    times = [step_seconds(step(model, 2**17, 0), kept(32, 32, 32), H100, full=True) for model in (LLAMA_8B, idle)]
    assert times[0] == times[1]


def test_seconds_of_experts_are_within_two_percent_of_a_measured_step() -> None:
    """gpt-oss-20b at 128K tokens on one H200, see docs/results/kinds.md; as the model has them it took 22.6 s."""
    gpt_oss = ModelSizes(
        24, 2880, 11_520, 64, 8, 64, 64, 823_518_752, windows=(128, None) * 12, idle_width=80_640, experts=4
    )
    own = step(gpt_oss, 2**17, 201_088)

    def check(sizes: StepSizes) -> None:
        seconds = step_seconds(sizes, kept(24, 24, 24), GPUS["h200"], full=False)
        assert seconds == pytest.approx(16.207, rel=0.02)

    check(replace(own, fused_experts=True))
    dense = replace(gpt_oss, experts=0, intermediate=gpt_oss.intermediate + gpt_oss.idle_width, idle_width=0)
    assert_rejects(check, {"the model's own": own, "no experts": replace(own, model=dense)})


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
