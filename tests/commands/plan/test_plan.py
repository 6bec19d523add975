"""`hf-fpdt plan`: a model's sizes from its configuration, and what the command finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3MoeConfig

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.main import main
from hf_fpdt.commands.plan.command import _beyond_positions
from hf_fpdt.commands.plan.tables import as_json
from hf_fpdt.forecast.fit import Machines, fit, machine_bytes
from hf_fpdt.forecast.rates import GPUS, UNUSABLE_GIB, with_memory
from hf_fpdt.model.shapes import build_random, llama_8b, training_of, training_of_model, with_layers
from hf_fpdt.model.weights.packing import quantised_bytes, scale_bytes
from hf_fpdt.model.weights.quantised import is_quantised
from hf_fpdt.model.weights.whole import dequantised_weights
from hf_fpdt.plan.optimizers import OPTIMIZERS
from hf_fpdt.units import GIB
from tests.model.test_model_zoo import GEMMA4

TINY = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)

EXPERTS = Qwen3MoeConfig(
    **{"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32},
    **{"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
)
MACHINES = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=16 * GIB)


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


@pytest.mark.parametrize("lora", [True, False])
def test_sizes_are_those_of_the_model(lora: bool) -> None:

    training = training_of(TINY, lora=lora)
    model = build_random(TINY, "cpu", torch.bfloat16, lora)
    weights = training.weights
    assert weights.total == sum(p.numel() for p in model.parameters())
    assert weights.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights.outside == 2 * 1024 * 256 + 256
    assert training.model.layers == 4 and training.model.gated and training.model.head_dim == 32
    assert 4 * training.model.layer_parameters + weights.outside == weights.total
    layer = max(sum(p.numel() for p in part.parameters() if p.requires_grad) for part in layers_of(model))
    outside = weights.trained - 4 * layer
    assert weights.largest_trained == max(layer, outside) and (outside == 0) == lora


def test_the_shape_of_llama_8b_has_its_parameters() -> None:
    training = training_of(with_layers(llama_8b(), 1), lora=False)
    assert training.model.layer_parameters == 218_112_000 and training.weights.outside == 1_050_677_248


def test_the_command_plans_for_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--host-mem", "16", "--seq-len", "64K", "--chunk-tokens", "4K", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    machines = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=16 * GIB)

    expected = fit(replace(training_of(TINY, lora=True), chunk_tokens=4096), machines, 2**16)
    assert told == json.loads(json.dumps(as_json(expected, {})))
    assert told["exchange_seconds"] == told["gather_seconds"] == 0
    assert told["tokens"] == 65_536 and told["inputs_kept"] == told["layers"] == 4


def test_without_a_length_it_finds_the_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--host-mem", "8", "--gpus", "2", "--gpu", "a100-40"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "a quarter more GPU memory" in text and "2 x A100 40GB" in text
    assert "ends by host memory; longer with" in text or "ends by GPU memory; longer with" in text


def test_a_length_that_the_model_was_not_made_for_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def noted(seq_len: str, **changes: object) -> str:
        config = LlamaConfig(**{**TINY.to_dict(), **changes})
        config.save_pretrained(tmp_path)
        assert main(["plan", str(tmp_path), "--host-mem", "16", "--seq-len", seq_len, "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["layers"] == 4, "what programs read is as ever"
        return printed.err

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048}
    assert "16,384 tokens fit in memory, but" in noted("16K") and "ends at 2,048 positions" in noted("16K")
    assert noted("2K") == "" and noted("16K", max_position_embeddings=16_384) == ""
    assert noted("16K", rope_parameters=yarn) == "" and "ends at 16,384" in noted("32K", rope_parameters=yarn)


def test_a_model_without_a_rotary_embedding_is_not_told_to_stretch_it() -> None:
    """Nemotron-H has none, and Granite 4 has the parameters of one that it uses where it is told to alone."""
    for name, changes, stretch in (
        ("llama", {}, True),
        ("granitemoehybrid", {"position_embedding_type": "rope"}, True),
        ("granitemoehybrid", {}, False),
        ("nemotron_h", {}, False),
    ):
        note = _beyond_positions(AutoConfig.for_model(name, max_position_embeddings=64, **changes), 65) or ""
        assert "ends at 64 positions" in note and ("stretch its rotary embedding (" in note) == stretch


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--host-mem", "128", "--gpus", "3"],
            "32 query heads and every chunk of 32,766 tokens, so it must divide both; take one of 1, 2, 4, 8, 16, 32.",
        ),
        (["--host-mem", "8", "--gpu", "a100-40", "--seq-len", "1M"], "Ways out"),
        (["--host-mem", "lots"], "A number of GiB"),
        ([], "--host-mem"),
        (["no/such/model", "--host-mem", "8"], "no/such/model: there is no such folder"),
        (["./model", "--host-mem", "8"], "./model: there is no such folder"),
        ([__file__, "--host-mem", "8"], "it is a file"),
        (["no-such/model", "--host-mem", "8"], "there is no folder no-such/model here either"),
        (["--gpu", "b9000", "--host-mem", "8"], "'h100', 'h200'"),
    ],
)
def test_mistakes_end_with_status_2_and_without_a_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fpdt.commands.options.SHAPES", {"llama-8b": lambda: with_layers(llama_8b(), 2)})
    try:
        status = main(["plan", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("jamba", "it does not go on from it (Mamba-1)"),
        ("minimax", "leaves no state in a cache"),
        ("gemma4_text", "its layers differ in head_dim (256, 512)"),
        ("deepseek_v32", "layers of type indexed_attention"),
    ],
)
def test_what_fpdt_refuses_to_train_is_not_planned(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--host-mem", "128"]) == 2
    printed = capsys.readouterr()
    assert (
        "there is nothing to plan. FPDT cannot run" in printed.err
        and said in printed.err
        and printed.err.count("\n") == 1
    )
    assert not printed.out


def test_a_model_whose_sizes_stand_by_layer_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.for_model("gemma4_text", **GEMMA4, num_hidden_layers=2, vocab_size=1024, intermediate_size=512)
    assert config.is_heterogeneous
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--host-mem", "16", "--seq-len", "64K", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    machines = Machines(gpu=GPUS["h100"], gpus=1, host_bytes=16 * GIB)
    plain = AutoConfig.for_model("gemma4_text", **GEMMA4, num_hidden_layers=2, vocab_size=1024, intermediate_size=512)
    plain.per_layer_config, plain.head_dim = None, 16
    assert told == json.loads(json.dumps(as_json(fit(training_of(plain, lora=True), machines, 2**16), {})))


def test_without_host_memory_it_says_what_a_length_needs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--shape", "llama-8b", "--gpus", "4", "--seq-len", "2M"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hidden = 2 * 1024**2 // 4 * 4096 * 2  # bytes of a rank's hidden states
    lse = 2 * 1024**2 * 8 * 4
    kept = 4 * 32 * (2 * hidden + lse)
    assert found["host_bytes"] + 4 * found["device_bytes"]["checkpoints"] == pytest.approx(kept, rel=0.01)
    assert found["least_host_bytes"] < found["host_bytes"] and found["seconds_with_least"] > found["seconds"]
    assert found["seconds"] > found["exchange_seconds"] > found["gather_seconds"] == 0
    assert main(arguments) == 0
    least = f"{machine_bytes(found['least_host_bytes']) / GIB:,.1f} {found['seconds_with_least']:,.1f} s"
    text = " ".join(capsys.readouterr().out.split())
    assert f"the least {least}" in text
    assert f"exchanges between GPUs: {found['exchange_seconds']:.1f} s of the step" in text
    assert main(["plan", "--shape", "llama-8b"]) == 2 and "--host-mem is needed" in capsys.readouterr().err


def device_bytes(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, int]:
    """What a plan of 64K tokens has on the GPU."""
    assert main(["plan", "--seq-len", "64K", "--chunk-tokens", "4K", "--host-mem", "16", "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out)["device_bytes"])


def test_the_optimizer_takes_what_its_kind_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    taken = {kind: device_bytes(capsys, str(tmp_path), "--full", "--optimizer", kind) for kind in OPTIMIZERS}
    gradients = taken["sgd"]["gradients"]
    assert gradients and {kind: row["optimizer"] / gradients for kind, row in taken.items()} == {
        "adamw": 2,
        "adamw-8bit": 1,
        "lion": 1,
        "adafactor": 0,
        "sgd-momentum": 1,
        "sgd": 0,
    }
    assert device_bytes(capsys, str(tmp_path), "--full") == taken["adamw"]
    assert device_bytes(capsys, str(tmp_path), "--lora") == device_bytes(capsys, str(tmp_path))


def test_a_gpu_with_other_memory_is_named_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--host-mem", "8", "--gpus", "2", "--seq-len", "64K"]
    texts = []
    for memory in (["--gpu-mem", "40"], ["--gpu-mem", "80"], []):
        assert main([*arguments, *memory]) == 0
        texts.append(capsys.readouterr().out)
    assert "2 x H100 40GB" in texts[0] and f"{40 - UNUSABLE_GIB:.1f}" in texts[0]
    assert texts[1] == texts[2] != texts[0], "80 is what an H100 has"


@pytest.mark.parametrize("name", ["H100 80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L40S"])
def test_another_memory_takes_the_place_of_the_one_in_the_name(name: str) -> None:
    gpu = with_memory(replace(GPUS["h100"], name=name), 48)
    assert gpu.name == f"{name.split(' 80')[0]} 48GB" and gpu.memory_gib == 48 - UNUSABLE_GIB


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bytes_are_those_that_bitsandbytes_stores(kind: str) -> None:
    """All of a real model's bytes, with scales and tables, and those of the layer that is dequantised."""
    pytest.importorskip("bitsandbytes")
    for config in (TINY, EXPERTS):
        training = training_of_model(build_random(config, "meta", torch.bfloat16, False), lora=True, quantised=kind)
        model: Any = build_random(config, "cpu", torch.bfloat16, True, kind)
        found = quantised_bytes(model)
        assert (training.weights.packed, training.weights.packed_bytes) == found and found[0] > 0
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=128))
        own = handle._settings.sizes
        for name in ("layer_parameters", "whole_weights", "gated", "merged"):
            assert getattr(training.model, name) == getattr(own, name), name
        handle.remove()
        stored = sum(p.numel() * p.element_size() for p in model.parameters()) + scale_bytes(model)
        (_, planned), *_ = fit(training, MACHINES, 16_384).device
        assert planned == stored
        layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
        with dequantised_weights(layer, handle._settings, torch.bfloat16):
            whole = [m.weight for m in layer.modules() if is_quantised(m)]
            assert sum(w.numel() * w.element_size() for w in whole) == fit(training, MACHINES, 16_384).step.whole_bytes


def test_a_plan_says_what_is_quantised_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EXPERTS.save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--host-mem", "8", "--seq-len", "64K"]
    assert main([*command, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*command, "--json", "--quantize", "nf4"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    saved = plain["device_bytes"]["weights"] - found["device_bytes"]["weights"]
    assert saved == 2 * found["quantised_weights"] - found["quantised_bytes"] > 0
    assert "quantised_weights" not in plain and found["seconds"] > plain["seconds"]
    assert f"{2 * 3 * 4 * 256 * 64:,} weights are experts that the model holds as one parameter" in said.err
    assert main([*command, "--quantize", "nf4"]) == 0
    assert "weights are quantised" in capsys.readouterr().out
    for option in ("--full", "--fsdp"):
        assert main([*command, "--quantize", "nf4", option]) == 2
        assert f"leave {option} out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_weights_on_the_host_are_planned_to_the_byte(kind: str | None) -> None:
    if kind is not None:
        pytest.importorskip("bitsandbytes")
    for config in (TINY, EXPERTS):
        training = training_of_model(build_random(config, "meta", torch.bfloat16, False), lora=True, quantised=kind)
        model: Any = build_random(config, "cpu", torch.bfloat16, True, kind)
        handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=128, host_weights=True))
        real = handle._settings.host_weights
        found = fit(replace(training, host_weights=True), MACHINES, 16_384)
        assert real is not None and found.host_weights == real.nbytes
        assert found.step.model.fetched_bytes == real.largest == handle._settings.sizes.fetched_bytes
        (_, on_device), *_ = found.device
        stays = [p for name, p in model.named_parameters() if p.requires_grad or ".layers." not in name]
        assert on_device == sum(p.numel() * p.element_size() for p in stays)
        with pytest.raises(MemoryError, match="of host memory for each GPU"):
            fit(replace(training, host_weights=True), replace(MACHINES, host_bytes=6 * GIB), 16_384)
        handle.remove()


def test_the_command_plans_weights_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--shape", "llama-70b", "--seq-len", "64K", "--host-weights"]
    assert main([*command, "--host-mem", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["host_weight_bytes"] > 127 * GIB and found["device_bytes"]["weights"] < 5 * GIB
    assert main([*command, "--host-mem", "128"]) == 2
    assert "the weights of the layers need 127.5 GiB of host memory" in capsys.readouterr().err
    assert main([*command, "--host-mem", "256", "--full"]) == 2
    assert "--host-weights: weights that train stay on the GPU" in capsys.readouterr().err
