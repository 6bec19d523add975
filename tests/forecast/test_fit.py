"""What fits: the arithmetic of a plan for machines, and the longest sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_results import read_json

from hf_fpdt.forecast.fit import Machines, Training, Use, Weights, fit, machine_bytes, sharded_weights
from hf_fpdt.forecast.rates import GPUS, with_memory
from hf_fpdt.forecast.searches import STEP_TOKENS, More, host_needed, longest, what_would_help
from hf_fpdt.forecast.seconds import sharded_seconds, step_seconds, ulysses_seconds
from hf_fpdt.units import GIB
from tests.forecast.test_rates import LLAMA_8B

LORA = Weights(total=8_072_204_288, trained=41_943_040, largest_trained=1_310_720, outside=1_050_677_248)
TRAINING = Training(model=LLAMA_8B, weights=LORA, vocabulary=128_256, chunk_tokens=32_768, loss_tokens=1024)
WIDER = Machines(gpu=GPUS["h200"], gpus=1, host_bytes=128 * GIB)
ONE = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=128 * GIB)


@pytest.mark.parametrize(("n_tokens", "device_gib"), [(2**17, 74.45), (2**18, 74.24), (2**19, 75.31)])
def test_a_plan_predicts_the_memory_of_measured_steps(n_tokens: int, device_gib: float) -> None:
    """One H100 and 128 GiB without Liger's kernels, docs/results/offload.md: within 10 %, its reserve included."""
    found = fit(replace(TRAINING, fused=False), ONE, n_tokens)
    assert sum(size for _, size in found.device) / GIB == pytest.approx(device_gib, rel=0.1)
    assert found.copy_seconds < 0.05 * found.seconds


@pytest.mark.parametrize("name", ["512k-h100", "768k-h100", "1m-8-layers-h100", "512k-2xh100", "1m-2xh100"])
def test_long_steps_reach_what_was_predicted(name: str) -> None:
    """Of docs/results/, on one and two H100: GPU memory within 2 %, host memory 0.5 %, seconds without pinning 5 %."""
    step = read_json(name)
    layers, measured = step["layers"] or LLAMA_8B.layers, step["measured"]["steps"][-1]
    settings, gpus = step["settings"], int(step["gpus"].split()[0])
    shares = {"total": 8_072_204_288 - 1_050_677_248, "trained": 41_943_040}
    counts = {part: whole * layers // LLAMA_8B.layers for part, whole in shares.items()}
    weights = replace(LORA, total=counts["total"] + LORA.outside, trained=counts["trained"])
    training = replace(TRAINING, model=replace(LLAMA_8B, layers=layers), weights=weights, loss_tokens=2048)
    host_bytes, kept = machine_bytes(int(settings["host_budget_gib"]) * GIB * gpus), settings["device_budget_gib"]
    kept_bytes = None if kept == "auto" else int(kept * GIB)
    machines = replace(ONE, gpus=gpus, host_bytes=host_bytes, kept_bytes=kept_bytes)
    found = fit(training, machines, step["tokens"])
    assert found.peak / GIB == pytest.approx(measured["device_peak_gib"], rel=0.02)
    assert found.host / GIB == pytest.approx(measured["host_gib"], rel=0.005)
    seconds = measured["step_seconds"] - step["measured"]["pinning_seconds"]
    assert found.seconds == pytest.approx(seconds, rel=0.05)


WINDOWS = replace(LLAMA_8B, windows=(4096,) * 32)


def test_a_model_of_windows_alone_reaches_further_with_the_same_memory() -> None:
    narrower = replace(TRAINING, chunk_tokens=65_536)
    mixed = replace(LLAMA_8B, windows=(4096, 4096, 4096, None) * 8)
    found = [fit(replace(narrower, model=model), ONE, 2**19) for model in (LLAMA_8B, mixed, WINDOWS)]
    assert [f.seconds for f in found] == sorted((f.seconds for f in found), reverse=True)
    lengths = [longest(replace(narrower, model=model), ONE) for model in (LLAMA_8B, WINDOWS)]
    assert lengths[0] is not None and lengths[1] is not None
    assert lengths[1].step.plan.n_tokens > lengths[0].step.plan.n_tokens
    assert lengths[1].plan.kv.host_bytes == 0 and dict(lengths[1].device)[Use.KV] == lengths[1].plan.kv.backward_ring


def test_a_ring_that_a_gpu_has_no_room_for_is_refused() -> None:
    wide = replace(TRAINING, model=replace(LLAMA_8B, windows=(500_000,) * 32))
    needed = dict(fit(wide, ONE, 2**19).device)[Use.KV]
    rest = sum(size for use, size in fit(wide, ONE, 2**19).device if use not in (Use.KV, Use.CHECKPOINTS))
    gpus = [replace(ONE.gpu, memory_gib=(rest + needed + more) / GIB) for more in (2**20, -(2**20))]
    plenty = replace(ONE, host_bytes=1024 * GIB)
    assert fit(wide, replace(plenty, gpu=gpus[0]), 2**19)
    with pytest.raises(MemoryError, match="keys and values that a window reaches"):
        fit(wide, replace(plenty, gpu=gpus[1]), 2**19)


def test_gradients_come_as_checkpoints_go() -> None:
    """Of every weight: with all gradients the last layer's checkpoints, or all checkpoints and one layer's sums."""
    weights = replace(LORA, trained=LORA.total, optimizer="sgd")
    found = fit(replace(TRAINING, weights=weights, model=replace(LLAMA_8B, layers=2)), WIDER, 2**15)
    forecast, step = found.plan.forecast, found.step
    assert forecast.device_bytes > 0 == found.host
    working = step.working_bytes(found.plan.kv, checkpoints_elsewhere=False, resident=True)
    inside = LORA.total - LORA.outside
    beside = max((2 + 4) * inside // 2 + forecast.device_bytes, 2 * inside + forecast.device_bytes // 2)
    assert found.peak == pytest.approx(2 * LORA.total + 2 * LORA.outside + working + beside, abs=8)


def test_what_trains_under_fsdp2_is_in_fp32() -> None:
    """As accelerate has it; docs/results/ has a step of every weight of the 8B shape on four H200."""
    step = read_json("full-256k-4xh200")
    full = replace(LORA, trained=LORA.total, largest_trained=LORA.outside)
    machines = replace(WIDER, gpus=4, host_bytes=512 * GIB, sharded=True, kept_bytes=40 * GIB)
    found = fit(replace(TRAINING, weights=full), machines, step["tokens"])
    assert found.peak / GIB == pytest.approx(step["measured"]["steps"][-1]["device_peak_gib"], rel=0.02)
    sizes = dict(found.device)
    assert sizes[Use.GRADIENTS] == LORA.total and sizes[Use.OPTIMIZER] == 2 * LORA.total, (
        "a quarter of four bytes each"
    )
    adapters = dict(fit(TRAINING, machines, step["tokens"]).device)
    assert adapters[Use.GRADIENTS] == LORA.trained
    gathered = 2 * (2 * LLAMA_8B.layer_parameters + LORA.outside)
    assert adapters[Use.WEIGHTS] - gathered == pytest.approx((LORA.total + LORA.trained) / 2, abs=8)


FOUR = replace(ONE, gpus=4, host_bytes=512 * GIB)
WIDE = replace(TRAINING, chunk_tokens=8 * 32_768)  # for several GPUs, and quick to plan


@pytest.mark.parametrize("machines", [ONE, FOUR, replace(ONE, disk_bytes=100 * GIB)])
def test_the_longest_fits_and_the_next_length_does_not(machines: Machines) -> None:
    training = TRAINING if machines.gpus == 1 else WIDE
    found = longest(training, machines)
    assert found is not None
    n_tokens = found.step.plan.n_tokens
    assert n_tokens % STEP_TOKENS == 0 and fit(training, machines, n_tokens) == found
    with pytest.raises(MemoryError):
        fit(training, machines, n_tokens + STEP_TOKENS)


def test_nothing_promised_is_more_than_there_is() -> None:
    for machines in (ONE, replace(ONE, gpus=8, host_bytes=256 * GIB, sharded=True), replace(ONE, gpu=GPUS["a100-40"])):
        for full in (False, True):
            weights = replace(LORA, trained=LORA.total, largest_trained=LORA.outside) if full else LORA
            found = longest(replace(WIDE, weights=weights), machines)
            if found is None:
                assert full and not machines.sharded
                continue
            assert sum(size for _, size in found.device) <= machines.gpu.memory_gib * GIB
            assert found.host <= machines.host_bytes


def test_several_gpus_have_buffers_to_speak_through() -> None:
    one, four = (dict(fit(WIDE, replace(ONE, gpus=gpus), 2**18).device) for gpus in (1, 4))
    assert Use.NCCL not in one and 0.5 * GIB < four[Use.NCCL] < 2 * GIB


def test_more_of_anything_is_never_less_long() -> None:
    found = longest(WIDE, ONE)
    assert found is not None
    helps = what_would_help(WIDE, ONE)
    assert len(helps) == 3 and all(tokens >= found.step.plan.n_tokens for tokens in helps.values())
    assert helps[More.GPUS] > 1.9 * found.step.plan.n_tokens


def test_sharding_leaves_more_room() -> None:
    eight = replace(ONE, gpus=8, host_bytes=1024 * GIB)
    lengths = [longest(WIDE, replace(eight, sharded=sharded)) for sharded in (False, True)]
    assert lengths[0] is not None and lengths[1] is not None
    assert lengths[1].step.plan.n_tokens > lengths[0].step.plan.n_tokens


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 16])
def test_a_step_takes_what_is_computed_and_what_computation_waits_for(gpus: int, sharded: bool) -> None:
    machines = replace(ONE, gpus=gpus, host_bytes=64 * GIB if gpus == 1 else 0, sharded=sharded)
    found = fit(WIDE, machines, 2**18)
    kept, gpu = found.plan.kept, machines.gpu
    computed, exchanged = step_seconds(found.step, kept, gpu, full=False), ulysses_seconds(found.step, kept, gpu)
    gathered, again = sharded_seconds(sharded_weights(WIDE, gpus), kept, gpu) if sharded else (0.0, 0.0)
    assert found.seconds == pytest.approx(computed + exchanged + again)
    assert found.exchange_seconds == pytest.approx(exchanged + again) and found.gather_seconds == gathered
    assert (found.exchange_seconds > 0) == (gpus > 1) and (gathered > 0) == (gpus > 1 and sharded)
    assert (again > 0) == (sharded and gpus == 2), "on two GPUs inputs are rebuilt"


def test_weights_that_come_slower_than_a_layer_computes_set_the_pace() -> None:
    slow = replace(ONE, gpu=replace(GPUS["h100"], peers=1e9), gpus=2, sharded=True)
    found = fit(WIDE, slow, STEP_TOKENS)
    computed = step_seconds(found.step, found.plan.kept, slow.gpu, full=False)
    assert found.seconds == found.gather_seconds + found.exchange_seconds > computed + found.exchange_seconds


def test_an_embedding_that_is_the_head_stays_whole_with_it() -> None:
    apart, tied = sharded_weights(TRAINING, 2), replace(LORA, outside=LORA.outside - 128_256 * 4096)
    same = sharded_weights(replace(TRAINING, weights=tied), 2)
    assert apart.embedding == 128_256 * 4096 * 2 and apart.tail == apart.embedding + 4096 * 2
    assert same.embedding == 0 and same.tail == apart.tail
    assert apart.trained == 2 * LORA.trained and apart.layer == 2 * LLAMA_8B.layer_parameters


def test_what_never_fits_says_so() -> None:
    small = replace(ONE, gpu=replace(GPUS["h100"], memory_gib=16.0))
    assert longest(TRAINING, small) is None
    with pytest.raises(MemoryError, match="16,384 tokens need .* GiB of each H100"):
        fit(TRAINING, small, STEP_TOKENS)


@pytest.mark.parametrize("machines", [ONE, FOUR])
def test_the_host_memory_needed_is_the_least_and_the_most_that_helps(machines: Machines) -> None:
    training, n_tokens = (TRAINING, 2**19) if machines.gpus == 1 else (WIDE, 2**21)
    least, most = host_needed(training, machines, n_tokens)
    assert most.plan.kept.rebuilt == most.plan.kept.attention_reruns == 0 and least.seconds > most.seconds
    for found, enough in ((least, True), (most, True)):
        have = replace(machines, host_bytes=machine_bytes(found.host))
        assert (fit(training, have, n_tokens).seconds <= found.seconds) == enough
    less = replace(machines, host_bytes=machine_bytes(least.host) - 2 * GIB)
    with pytest.raises(MemoryError):
        fit(training, less, n_tokens)
    slower = fit(training, replace(machines, host_bytes=machine_bytes(most.host) - 2 * GIB), n_tokens)
    assert slower.seconds > most.seconds


def test_the_longest_sequence_never_falls_as_memory_grows_where_the_chunk_is_chosen() -> None:
    training = replace(TRAINING, auto_chunk=True)
    found = {
        (gpu, host): longest(training, Machines(gpu=with_memory(GPUS["h100"], gpu), gpus=1, host_bytes=host * GIB))
        for gpu in (24, 40, 80)
        for host in (32, 128, 512)
    }
    tokens = {key: step.step.plan.n_tokens if step is not None else 0 for key, step in found.items()}
    assert tokens[24, 32] > 0
    for (gpu, host), own in tokens.items():
        assert all(other >= own for (g, h), other in tokens.items() if g >= gpu and h >= host), tokens
    small = Machines(gpu=with_memory(GPUS["h100"], 24), gpus=1, host_bytes=64 * GIB)
    fixed = longest(replace(training, auto_chunk=False, chunk_tokens=4096), small)
    chosen = longest(training, small)
    assert fixed is not None and chosen is not None
    assert chosen.step.plan.n_tokens >= fixed.step.plan.n_tokens > 5 * 16_384
    # The largest that fits: a short sequence has what it always had.
    assert fit(training, replace(small, gpu=GPUS["h100"]), 131_072).step.plan.chunk_tokens == 32_768
    assert fit(training, small, tokens[24, 32]).step.plan.chunk_tokens < 32_768
