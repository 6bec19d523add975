"""The bytes of a step by arithmetic, against numbers worked out by hand and configurations of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.plan.by_layer import LayersDiffer, why_no_sizes
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.sizes import PHASES, DeviceItem, StepSizes
from hf_fpdt.units import GIB
from tests.helpers.stores import NO_LIMIT, TINY
from tests.helpers.support import assert_rejects
from tests.plan.test_device_memory import GROWING

K = 1024
LLAMA = ModelSizes(
    layers=32,
    hidden=4096,
    intermediate=14336,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    layer_parameters=218_112_000,
)


def llama_step(n_tokens: int = 128 * K, chunk_tokens: int = 32 * K, sp_size: int = 1, **sizes: Any) -> StepSizes:
    return StepSizes(LLAMA, ChunkPlan(n_tokens, chunk_tokens, sp_size), **sizes)


def sizes_of(config: Any) -> ModelSizes:
    return ModelSizes.of(config, layers=config.num_hidden_layers, layer_parameters=218_112_000)


def test_sizes_are_read_off_the_configurations_of_real_models() -> None:
    llama = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    assert sizes_of(llama) == LLAMA
    neox = sizes_of(GPTNeoXConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8, rotary_pct=0.25))
    assert (neox.q_heads, neox.kv_heads, neox.head_dim, neox.rotary_dim) == (8, 8, 64, 16)
    qwen = sizes_of(Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128))
    assert (qwen.hidden, qwen.q_heads * qwen.head_dim, qwen.kv_heads) == (1024, 2048, 8), "heads wider than the model"
    gpt2 = sizes_of(AutoConfig.for_model("gpt2"))
    assert (gpt2.hidden, gpt2.intermediate, gpt2.q_heads, gpt2.kv_heads, gpt2.head_dim) == (768, 3072, 12, 12, 64)


def test_an_mlp_of_experts_is_as_wide_as_what_one_token_visits() -> None:
    mixtral = AutoConfig.for_model("mixtral", intermediate_size=14336, num_experts_per_tok=2)
    assert sizes_of(mixtral).intermediate == 2 * 14336
    qwen = AutoConfig.for_model("qwen3_moe", moe_intermediate_size=768, num_experts_per_tok=8, intermediate_size=6144)
    assert sizes_of(qwen).intermediate == 8 * 768
    shared = AutoConfig.for_model(
        "qwen2_moe", moe_intermediate_size=1408, num_experts_per_tok=4, shared_expert_intermediate_size=5632
    )
    assert sizes_of(shared).intermediate == 4 * 1408 + 5632
    more = AutoConfig.for_model("glm4_moe", moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1)
    assert sizes_of(more).intermediate == 9 * 1408


def test_what_layers_have_in_common_is_read_off_any_of_them() -> None:
    by_layer = {i: {"head_dim": 64, "num_key_value_heads": 2} for i in range(2)}
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8}
    found = sizes_of(Qwen3Config(**sizes, intermediate_size=512, per_layer_config=by_layer))
    assert (found.hidden, found.q_heads, found.kv_heads, found.head_dim, found.intermediate) == (256, 8, 2, 64, 512)
    wider = {0: {"intermediate_size": 1024}}
    assert sizes_of(Qwen3Config(**sizes, intermediate_size=512, per_layer_config=wider)).intermediate == 1024
    assert (
        sizes_of(AutoConfig.for_model("gemma3n_text", intermediate_size=[64] * 30, num_hidden_layers=30)).intermediate
        == 64
    )


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_sizes_that_differ_by_layer_are_named_with_their_values(name: str) -> None:
    config = Qwen3Config(num_hidden_layers=2, num_attention_heads=8, per_layer_config={1: {name: 4}})
    values = {"num_attention_heads": "8, 4", "num_key_value_heads": "32, 4", "head_dim": "128, 4"}[name]
    with pytest.raises(LayersDiffer, match=rf"differ in {name} \({values}\)"):
        sizes_of(config)
    assert [reason for reason in why_no_sizes(config) if f"{name} ({values})" in reason]
    assert not why_no_sizes(Qwen3Config())


def assert_llama_bytes(of: Callable[[StepSizes], StepSizes]) -> None:
    step = of(llama_step())
    assert step.unit == GIB
    sizes, kv = step.layer_bytes(), step.kv_bytes(NO_LIMIT)
    assert sizes.inputs == sizes.outs == (GIB // 4,) * 4
    assert sizes.lses == (4 * 32 * 32 * K,) * 4
    assert sizes.input_total == GIB and sizes.attention_total == GIB + GIB // 64
    assert 2 * sum(kv.parts) == GIB // 2 and 2 * sum(kv.grads) == GIB, "K + V, and dK + dV in fp32"
    assert kv.device_bytes == GIB * 3 // 2 and kv.host_bytes == 0


def test_one_layer_of_llama_8b_at_128k_takes_what_is_worked_out_by_hand() -> None:
    assert_llama_bytes(lambda step: step)
    assert_rejects(
        assert_llama_bytes,
        {
            "a byte an element": lambda step: replace(step, attention_bytes=1),
            "fp32 hidden states": lambda step: replace(step, element_bytes=4),
            "a chunk too few": lambda step: replace(step, plan=ChunkPlan(96 * K, 32 * K)),
            "as many key heads as query heads": lambda step: replace(step, model=replace(LLAMA, kv_heads=32)),
        },
    )


@pytest.mark.parametrize("sp_size", [2, 4, 8, 16])
def test_ranks_share_everything_but_key_heads_that_are_too_few(sp_size: int) -> None:
    step = llama_step(sp_size=sp_size)
    assert step.unit == GIB // sp_size
    sizes, kv = step.layer_bytes(), step.kv_bytes(NO_LIMIT)
    assert sizes.input_total == GIB // sp_size and sum(sizes.outs) == GIB // sp_size
    assert sum(sizes.lses) == GIB // 64 // sp_size
    heads = max(1, 8 // sp_size)
    assert step.kv_heads == heads
    assert 2 * sum(kv.parts) == GIB // 16 * heads and 2 * sum(kv.grads) == GIB // 8 * heads


def test_key_heads_that_ranks_do_not_divide_are_repeated_until_they_do() -> None:
    model = replace(LLAMA, q_heads=24, kv_heads=6)
    heads = [StepSizes(model, ChunkPlan(48, 48, ranks)).kv_heads for ranks in (1, 2, 3, 4, 6, 8, 12)]
    assert heads == [6, 3, 2, 3, 1, 3, 1]


def test_elements_are_counted_in_their_own_width() -> None:
    wide = llama_step(element_bytes=4, attention_bytes=2)
    assert wide.layer_bytes().inputs[0] == 2 * wide.layer_bytes().outs[0], "autocast: hidden states in fp32"
    double = llama_step(element_bytes=8, attention_bytes=8)
    assert double.layer_bytes().lses == tuple(2 * n for n in llama_step().layer_bytes().lses), "float64 sums"
    assert double.kv_bytes(0).grads == double.kv_bytes(0).parts
    two, one = llama_step(batch=2), llama_step()
    assert two.unit == 2 * one.unit and two.layer_bytes().outs == tuple(2 * n for n in one.layer_bytes().outs)


def test_the_last_chunk_is_as_long_as_it_is() -> None:
    step = StepSizes(TINY, ChunkPlan(22, 8, 2), element_bytes=2, attention_bytes=2)
    sizes, kv = step.layer_bytes(), step.kv_bytes(NO_LIMIT)
    assert sizes.inputs == (256, 256, 192) and sizes.outs == (256, 256, 192)
    assert sizes.lses == (64, 64, 48) and sizes.longest == 256
    assert kv.parts == (128, 128, 96) and kv.grads == (256, 256, 192)
    assert kv.device_bytes == 2 * (352 + 704)


def test_chunks_are_resident_up_to_the_last_byte_of_the_budget() -> None:
    step = StepSizes(TINY, ChunkPlan(22, 8), element_bytes=2, attention_bytes=2)
    parts, grads = (256, 256, 192), (512, 512, 384)
    for whole in range(4):
        forward = 2 * sum(parts[:whole])
        backward = forward + 2 * sum(grads[:whole])
        assert step.kv_bytes(forward).forward_resident == whole == step.kv_bytes(backward).backward_resident
        if whole:
            assert step.kv_bytes(forward - 1).forward_resident == whole - 1
            assert step.kv_bytes(backward - 1).backward_resident == whole - 1
    for budget in (0, 511, 512, 1535, 1536, 10**4):
        kv = step.kv_bytes(budget)
        assert kv.device_bytes <= budget and kv.backward_resident <= kv.forward_resident
    nothing = step.kv_bytes(0)
    assert (nothing.forward_resident, nothing.backward_resident, nothing.device_bytes) == (0, 0, 0)
    # The last chunk is never copied out; nor is what is added to the one before.
    assert nothing.host_bytes == 2 * (256 + 256 + 512)


def test_attention_outweighs_the_linears_of_llama_8b_from_about_53k_tokens() -> None:
    # A layer's linears: 2 operations a weight and token. Causal attention: 2 N H S a token.
    assert llama_step(n_tokens=53_250).attention_costs(2) == pytest.approx((1.0, 1.0), rel=1e-3)
    assert llama_step().attention_costs(1) == pytest.approx((2 * 128 * K * 4096 / (2 * 218_112_000),))


def test_where_the_mlp_is_narrow_the_peak_is_in_attention() -> None:
    """One layer of 32 plain heads with an MLP 8 wide, in full, all on the host: 24.85 GiB on one H100 (4d28c03)."""
    narrow = replace(LLAMA, layers=1, intermediate=8, kv_heads=32, layer_parameters=67_215_360)
    step = StepSizes(narrow, ChunkPlan(256 * K, 64 * K, 1), loss_tokens=256 * K, vocabulary=32, fused=True)
    weights_and_states = 4 * 2 * (67_215_360 + 2 * 32 * 4096)
    found = step.working_bytes(step.kv_bytes(0), resident=True) + weights_and_states
    assert found / GIB == pytest.approx(24.85, rel=0.03)
    wide = replace(step, model=replace(narrow, intermediate=14_336, layer_parameters=243_269_632))
    mlp = 64 * K * 2 * (5 * 4096 + 4 * 14_336)
    assert (
        next(
            row.nbytes
            for row in wide.device_rows(wide.kv_bytes(0))
            if (row.kind, row.phases) == ("activations", ("backward",))
        )
        == mlp
    )


def test_a_reference_has_room_for_its_whole_forward_pass() -> None:
    """Measured with two answers of 128K tokens on one H200 (docs/trl.md): 138.61 GiB at the peak, in that pass.

    Of these 100.41 were checkpoints, 15.59 weights, adapters and what AdamW has of them, and 2.00 embeddings that were
    held for a gradient, which they are no more.
    """
    step = llama_step(131_136, batch=2, fused=True, loss_tokens=2048, vocabulary=128_256, awaited=True)
    kv, measured = step.kv_bytes(NO_LIMIT), 138.61 - 100.41 - 15.59 - 2.00
    assert step.phase_bytes(kv, "forward", resident=True) / GIB == pytest.approx(measured, rel=0.02)


def test_the_table_of_device_memory_says_what_grows_with_the_sequence() -> None:
    short, long = (llama_step(n, loss_tokens=512, vocabulary=128_256) for n in (64 * K, 128 * K))
    tables = [list(step.device_rows(step.kv_bytes(NO_LIMIT))) for step in (short, long)]
    for before, after in zip(*tables, strict=True):
        assert after.nbytes == before.nbytes * (2 if after.kind in GROWING else 1), after.name
        assert set(after.phases) <= set(PHASES)
    kv = long.kv_bytes(NO_LIMIT)
    resident = [row for row in tables[1] if row.kind == "resident_kv"]
    assert max(sum(row.nbytes for row in resident if phase in row.phases) for phase in PHASES) == kv.device_bytes
    assert long.working_bytes(kv) == long.working_bytes(replace(kv, forward_resident=4)), "resident K, V are apart"
    streamed = long.working_bytes(long.kv_bytes(0))
    assert streamed == long.working_bytes(kv) + 3 * 2 * (kv.parts[0] + kv.grads[0])


def test_no_number_hangs_on_the_words_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step = llama_step(loss_tokens=512, vocabulary=1024)
    kv = step.kv_bytes(NO_LIMIT)

    def sums() -> list[int]:
        return [
            step.working_bytes(kv, checkpoints_elsewhere=elsewhere, resident=resident)
            for elsewhere in (False, True)
            for resident in (False, True)
        ]

    before = sums()
    assert len(set(before)) == 4
    monkeypatch.setattr("hf_fpdt.plan.sizes.DeviceItem", lambda *args: replace(DeviceItem(*args), name="some bytes"))
    assert sums() == before
