"""What grows on the device with the sequence is what the table of `StepSizes.device_rows` says, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fpdt import FPDTPlugin, apply_fpdt, chunked_log_probs
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.model.shapes import build_random, llama_8b, neox_6_9b, with_layers
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.sizes import PHASES, StepSizes
from tests.helpers.live_bytes import live_bytes
from tests.helpers.support import assert_rejects

GIB = 2**30
CHUNK = 64
# Kinds of rows that grow with the sequence; the others grow with the chunk, or not at all.
GROWING = frozenset({"entry", "hidden", "resident_kv"})
PLACES: dict[str, dict[str, Any]] = {
    # With outputs of linears kept the peak is where the backward pass begins, and not in a replay.
    "resident": {"checkpoints": "attention"},
    "all on the host": {"device_budget_gib": 0},
    "segments on the host": {"device_budget_gib": 0, "checkpoints": "segment"},
}


def narrow(shape: str) -> torch.nn.Module:
    """Two layers of a shape, wide enough that token ids do not count, in fp32."""
    config = with_layers({"llama": llama_8b, "neox": neox_6_9b}[shape](), 2)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 512, 128
    config.num_attention_heads = 8
    if shape == "llama":
        config.num_key_value_heads, config.head_dim = 2, 32
    return build_random(config, "cpu", torch.float32, lora=True)


def peak_and_growth(shape: str, n_tokens: int, place: dict[str, Any]) -> tuple[int, int]:
    """Peak of a step without the device's checkpoints, and what the table says of it that grows."""
    model = narrow(shape)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=64, **place))
    ids = torch.randint(0, 128, (1, n_tokens))
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    with live_bytes() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    sizes, plan = next((step, plan) for (step, _), plan in handle.store.plans.items())
    # At these lengths what one chunk needs in the backward pass decides where the peak is.
    growth = sum(row.nbytes for row in sizes.device_rows(plan.kv) if row.kind in GROWING and "backward" in row.phases)
    on_device = plan.forecast.device_bytes
    handle.remove()
    return counter.peak - on_device, growth


@pytest.mark.parametrize("shape", ["llama", "neox"])
@pytest.mark.parametrize("place", PLACES)
def test_the_peak_grows_with_the_sequence_as_the_table_says(
    shape: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kernel's own dK, dV are as long as its keys; a call's keys are bounded, here below the shorter length.
    monkeypatch.setattr("hf_fpdt.engine.calls.BACKWARD_CALL_TOKENS", 2 * CHUNK)
    (short, short_growth), (long, long_growth) = (
        peak_and_growth(shape, n_tokens, PLACES[place]) for n_tokens in (6 * CHUNK, 14 * CHUNK)
    )
    measured = long - short

    def check(predicted: int) -> None:
        assert measured == pytest.approx(predicted, rel=0.03), f"{measured / unit:.3f}, {predicted / unit:.3f} units"

    unit = 8 * CHUNK * 256 * 4
    check(long_growth - short_growth)
    assert_rejects(check, {"a tensor of hidden states more": long_growth - short_growth + unit})


@dataclass(frozen=True)
class Between:
    """A reference's pass between a policy's and its backward pass; bytes, without the device's checkpoints.

    Attributes:
        kept: there when the reference begins.
        peak: the most while it runs.
        ids: of what is made of token ids not all is kept: so many at most.
        table: what the table says grows then, of what is kept, and of all.
    """

    kept: int
    peak: int
    ids: int
    table: tuple[int, int]


def scored(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    log_probs = chunked_log_probs(model, input_ids=ids, labels=ids).log_probs
    assert log_probs is not None
    return log_probs.sum()


def reference_between(n_tokens: int, place: dict[str, Any]) -> Between:
    model, ids = narrow("llama"), torch.randint(0, 128, (1, n_tokens))
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=64, **place))
    with live_bytes() as counter:
        policy = scored(model, ids)
        kept = counter.peak = counter.now
        with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
            reference = scored(model, ids)
        peak = counter.peak
        (policy - reference).backward()
    sizes, plan = next((step, plan) for (step, _), plan in handle.store.plans.items())
    rows = [row for row in sizes.device_rows(plan.kv) if row.kind in GROWING and "forward" in row.phases]
    waits, on_device = next(row.nbytes for row in rows if "waits" in row.name), plan.forecast.device_bytes
    handle.remove()
    return Between(kept - on_device, peak - on_device, 32 * n_tokens, (waits, sum(row.nbytes for row in rows)))


@pytest.mark.parametrize("place", PLACES)
def test_a_reference_is_planned_beside_what_the_policy_keeps(place: str) -> None:
    short, long = (reference_between(n_tokens, PLACES[place]) for n_tokens in (6 * CHUNK, 14 * CHUNK))
    measured, unit = long.peak - short.peak, 8 * CHUNK * 256 * 4

    def check(predicted: tuple[int, int]) -> None:
        waits, grown = predicted
        assert waits - long.ids <= long.kept <= waits
        assert measured == pytest.approx(grown - short.table[1], rel=0.03), f"{measured / unit:.3f} units"

    waits, grown = long.table
    check((waits, grown))
    assert_rejects(
        check,
        {
            "its gradient left out": (waits - 14 * CHUNK * 256 * 4, grown),
            "nothing waits": (waits, grown - 3 * unit),
            "a unit more": (waits, grown + unit),
        },
    )


@pytest.mark.parametrize("shape", ["llama", "neox"])
def test_what_is_there_when_the_first_layer_begins(shape: str) -> None:
    model, n_tokens = narrow(shape), 6 * CHUNK
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    ids = torch.randint(0, 128, (1, n_tokens))
    model(input_ids=ids, labels=ids).loss.backward()
    sizes = next(sizes for (sizes, _) in handle.store.plans)
    begun: list[int] = []
    decoder: Any = model.get_submodule("base_model.model." + {"llama": "model", "neox": "gpt_neox"}[shape])
    first = decoder.layers[0]
    with live_bytes() as counter, first.register_forward_pre_hook(lambda *_: begun.append(counter.now)):
        model(input_ids=ids, labels=ids)
    handle.remove()
    # The ids were there before the counter, and of what is made of them not all is kept: 32 bytes a token at most.
    measured, ids_bytes = begun[0], 32 * n_tokens

    def check(predicted: int) -> None:
        assert predicted - ids_bytes <= measured <= predicted

    check(sizes.entry_bytes)
    assert_rejects(check, {"embeddings twice": sizes.entry_bytes + sizes.unit, "none": sizes.entry_bytes - sizes.unit})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama", "neox"])
@pytest.mark.parametrize("place", ["resident", "all on the host"])
def test_gpu_the_peak_is_what_the_table_says(shape: str, place: str) -> None:
    """Two layers at full width, 65,536 tokens in chunks of 16,384, bf16, LoRA."""
    config = with_layers({"llama": llama_8b, "neox": neox_6_9b}[shape](), 2)
    model = build_random(config, "cuda", torch.bfloat16, lora=True)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=16_384, **PLACES[place]))
    ids = torch.randint(0, config.vocab_size, (1, 65_536), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    sizes, plan = next((step, plan) for (step, _), plan in handle.store.plans.items())
    working = sizes.working_bytes(plan.kv, checkpoints_elsewhere=place != "resident", resident=True)
    predicted = working + plan.forecast.device_bytes
    handle.remove()
    print(f"{shape}, {place}: {measured / GIB:.3f} GiB over the weights, predicted {predicted / GIB:.3f}")
    assert measured == pytest.approx(predicted, rel=0.03)


def test_the_docs_list_every_tensor_that_grows() -> None:
    """The table of docs/offload.md is that of the arithmetic, for Llama-3.1-8B."""
    sizes = ModelSizes(32, 4096, 14_336, 32, 8, 128, 128, 218_112_000)
    step = StepSizes(sizes, ChunkPlan(2**17, 2**15))
    expected: dict[str, dict[str, int]] = {}
    for row in step.device_rows(step.kv_bytes(2**62)):
        if row.kind in GROWING:
            expected.setdefault(row.name, {}).update(dict.fromkeys(row.phases, row.nbytes // 2**17))
    table = Path("docs/offload.md").read_text().split("| tensor | forward | loss | backward |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    listed = {
        name.replace(" (0 to)", ""): {
            phase: int(cell.replace(",", "")) for phase, cell in zip(PHASES, cells, strict=True) if cell
        }
        for name, *cells in lines
    }
    assert listed == expected
