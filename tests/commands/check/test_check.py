"""`hf-fpdt check` says what is so: right where FPDT is right, and wrong, unsupported or a mistake where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from hf_fpdt.attention import AttentionSpec
from hf_fpdt.attention.kernels import table as kernels
from hf_fpdt.commands.accuracy import FACTOR, worst_of_run
from hf_fpdt.commands.check import command as cli_check
from hf_fpdt.commands.check.compare import TinyModel, _draw, check_attention
from hf_fpdt.commands.check.tiny_config import shrunk
from hf_fpdt.commands.main import main
from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.forecast.rates_file import read_rates, save_rates
from hf_fpdt.model.shapes import build_random
from tests.helpers.app_support import run_python
from tests.model.test_model_zoo import GEMMA4, ROUTED

CPU = torch.device("cpu")
NEOX = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "rotary_pct": 0.5}
GROUPED = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GROUPED |= {"intermediate_size": 128, "num_hidden_layers": 2}
LATENT = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16}
LATENT |= {"num_hidden_layers": 2, "q_lora_rank": 16, "first_k_dense_replace": 1, "num_experts_per_tok": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes a model's configuration; gives the folder's name."""

    def write(name: str, **changes: Any) -> str:
        AutoConfig.for_model(name, **changes).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors."""
    try:
        status = main(["check", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    said = capsys.readouterr()
    return status, said.out, said.err


# Supported and right -------------------------------------------------------------------------------------------------


def test_the_command_says_that_a_llama_is_right_here(folder: Callable[..., str]) -> None:
    model = folder("llama", **GROUPED, attention_bias=True, tie_word_embeddings=True)
    done = run_python("-m", "hf_fpdt.commands.main", "check", model, "--measure")
    assert done.returncode == 0, done.stderr
    for part in (
        "no CUDA GPU",
        "fa4             runs on CUDA devices, not on cpu",
        'cpu             yes, and what "auto" takes',
        "(LlamaForCausalLM) is supported: FPDT can train it exactly",
        "right with every kernel that is here: cpu, math",
        "there is no CUDA GPU here to measure",
    ):
        assert part in done.stdout, done.stdout
    assert "WRONG" not in done.stdout


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
        ("qwen3", GROUPED),
        ("apertus", GROUPED),  # has parameters of one number
        ("gemma4_text", {**GROUPED, **GEMMA4}),  # its layers' head dimension is not to be read off the whole
        ("qwen3_moe", {**GROUPED, "num_experts": 16, "moe_intermediate_size": 32}),
        ("mistral", {**GROUPED, "sliding_window": 4096}),
        ("gpt_oss", {**GROUPED, "num_local_experts": 4}),
        ("deepseek_v3", {**NEOX, **ROUTED, **LATENT}),
    ],
)
def test_supported_models_are_right_here(
    name: str, config: dict[str, Any], folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, folder(name, **config))
    assert status == 0 and "is supported" in out and out.count(" right  ") == 6, out


def test_kernels_are_named_for_each_kind_of_attention(
    folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Softcap is what `math` alone does here; a window has a line of its own."""
    config = {**GROUPED, "sliding_window": 64, "head_dim": 16, "attn_logit_softcapping": 30.0}
    status, out, _ = run(capsys, folder("gemma2", **config))
    assert status == 0 and "right with every kernel that is here: math" in out, out
    for kind in ("heads of 16, a window of 64 keys, softcap 30", "heads of 16, softcap 30"):
        assert f"kernels   for float32, {kind}\n" in out
    assert "does no softcap (30.0)" in out


# Not supported -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 2}, "ignores the attention registry"),
        ("gemma4_text", {**GROUPED, "layer_types": ["sliding_attention", "full_attention"]}, "differ in head_dim"),
        ("xlstm", {"hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2}, "has no num_attention_heads"),
        # Shows when the layers run.
        ("mamba", {"hidden_size": 64, "state_size": 4, "num_hidden_layers": 2}, "Mamba-1"),
        ("diffllama", GROUPED, "calls its attention function twice"),
    ],
)
def test_an_unsupported_model_ends_with_1_and_its_reason(
    name: str, config: dict[str, Any], reason: str, folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, folder(name, **config))
    said = " ".join(out.split())
    assert status == 1 and "is not supported:" in said and reason in said, out
    assert "errors" not in out and "result" not in out


def test_a_copy_that_does_not_run_is_no_reason_against_the_model(
    folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, folder("zamba2"))  # its attention is twice as wide as its hidden states
    assert status == 1 and "not supported" not in out and "nothing was compared" in out, out


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text"])
def test_copies_have_the_same_weights_in_every_dtype(name: str) -> None:
    """Sinks and decays are drawn by the model itself, in its own dtype."""
    weights = []
    for seed, dtype in enumerate((torch.float64, torch.float32)):
        torch.manual_seed(seed)
        model = build_random(shrunk(AutoConfig.for_model(name)), "cpu", dtype, False)
        _draw(model.parameters(), 1.0)
        weights.append([p.double() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


# A kernel that is not right ------------------------------------------------------------------------------------------


def wrong_scale(kernel: kernels.Kernel) -> kernels.Kernel:
    def forward(*args: Any, spec: AttentionSpec, **kwargs: Any) -> Any:
        return kernel.forward(*args, spec=replace(spec, scale=1.05 * spec.scale), **kwargs)

    return replace(kernel, forward=forward)


def lost_gradient(kernel: kernels.Kernel) -> kernels.Kernel:
    def backward(*args: Any, **kwargs: Any) -> Any:
        dq, dk, dv = kernel.backward(*args, **kwargs)
        return dq, torch.zeros_like(dk), dv

    return replace(kernel, backward=backward)


def crashes(kernel: kernels.Kernel) -> kernels.Kernel:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    return replace(kernel, forward=forward)


def gives_nan(kernel: kernels.Kernel) -> kernels.Kernel:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out, lse = kernel.forward(*args, **kwargs)
        return out.index_fill(1, torch.tensor([out.shape[1] - 1]), float("nan")), lse

    return replace(kernel, forward=forward)


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Puts a broken kernel in the table in place of the one of that name."""

    def put(name: str, broken: Any) -> None:
        table = {**kernels.KERNELS, name: broken(kernels.KERNELS[name])}
        monkeypatch.setattr(kernels, "KERNELS", MappingProxyType(table))
        kernels._select.cache_clear()

    yield put
    monkeypatch.undo()
    kernels._select.cache_clear()


@pytest.mark.parametrize("broken", [wrong_scale, lost_gradient, crashes, gives_nan], ids=lambda f: f.__name__)
def test_a_broken_kernel_ends_with_1_and_its_name(
    broken: Any,
    with_kernel: Callable[[str, Any], None],
    folder: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_kernel("math", broken)
    status, out, _ = run(capsys, folder("llama", **GROUPED))
    assert status == 1 and "not right with kernel math:" in out and "is supported" in out, out
    assert out.count("WRONG") == (1 if broken is crashes else 3) and out.count(" right  ") == 3
    assert ("no kernel image" in out) == (broken is crashes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [wrong_scale, lost_gradient, gives_nan], ids=lambda f: f.__name__)
def test_both_comparisons_find_a_broken_kernel_by_themselves(
    broken: Any, dtype: torch.dtype, with_kernel: Callable[[str, Any], None]
) -> None:
    tiny = TinyModel(AutoConfig.for_model("llama", **GROUPED), CPU)
    assert (
        check_attention("math", dtype, (4, 2), AttentionSpec.plain(16), CPU).passed
        and tiny.check("math", dtype).passed
    )
    with_kernel("math", broken)
    assert not check_attention("math", dtype, (4, 2), AttentionSpec.plain(16), CPU).passed
    assert not tiny.check("math", dtype).passed


# The comparison ------------------------------------------------------------------------------------------------------


def vectors(**errors: float) -> dict[str, Tensor]:
    """A tensor of 100 ones for each name, off by its error."""
    return {name: torch.ones(100, dtype=torch.float64) + error for name, error in errors.items()}


def test_the_worst_tensor_is_named_with_its_ratio() -> None:
    truth, plain = vectors(a=0, b=0), vectors(a=1e-3, b=1e-3)
    found = worst_of_run(vectors(a=1e-3, b=1.9e-3), plain, truth)
    assert found.name == "b" and found.ratio == pytest.approx(1.9) and found.passed
    assert worst_of_run(vectors(a=2.1e-3, b=0), plain, truth).ratio > FACTOR
    found = worst_of_run(vectors(a=float("nan"), b=0), plain, truth)
    assert found.name in ("a", "all together") and not found.passed
    assert worst_of_run(vectors(a=0), plain, truth).ratio == float("inf"), "a gradient is missing"


def test_a_lucky_plain_run_is_measured_by_its_error_elsewhere() -> None:
    truth, plain = vectors(a=0, b=0), vectors(a=1e-3, b=0)
    assert worst_of_run(vectors(a=1e-3, b=1e-3), plain, truth).ratio < FACTOR
    assert worst_of_run(vectors(a=1e-3, b=2e-3), plain, truth).ratio > FACTOR


def test_one_number_alone_proves_nothing_but_the_loss_does() -> None:
    truth, plain = vectors(a=0), vectors(a=1e-3)
    for name, found in (("alpha", False), ("loss", True)):
        one = {name: torch.ones(1, dtype=torch.float64)}
        ratio = worst_of_run({**plain, name: one[name] + 5e-3}, {**plain, **one}, {**truth, **one}).ratio
        assert (ratio > FACTOR) == found
        wrong = worst_of_run({**plain, name: 2 * one[name]}, {**plain, **one}, {**truth, **one}).ratio
        assert wrong > FACTOR, "a wrong number is found in either case"


# Mistakes, help and rates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/model"], "no/such/model"),
        (["--rates", "gpu.json"], "add --measure"),
        (["--measure", "--rates", "gpu.json"], "no CUDA GPU here"),
        (["--shape", "llama-9b"], "invalid choice"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2 and said in err and "Traceback" not in err and not out


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_setting_in_the_environment_that_is_none_ends_with_2(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPDT_KERNELS", "math")
    assert main([command]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: the environment variable FPDT_KERNELS='math'") and not said.out


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("llama", {**GROUPED, "per_layer_config": {0: {"intermediate_size": 64}}}, "per-layer attribute"),
        ("musicgen", {part: {} for part in ("text_encoder", "audio_encoder", "decoder")}, "has no attribute"),
        ("reformer", {}, "is_decoder=True"),
    ],
)
@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_configuration_that_makes_no_model_ends_with_2_and_a_line(
    command: str,
    name: str,
    config: dict[str, Any],
    said: str,
    folder: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "musicgen":
        kinds = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
        config = {part: {"model_type": kind} for part, kind in kinds.items()}
    model = folder(name, **config)
    status = main([command, model, *(["--host-mem", "8"] if command == "plan" else [])])
    error = capsys.readouterr().err
    assert status == 2 and "transformers makes no causal language model" in error and said in error
    assert error.count("\n") == 1


def test_help_says_what_it_answers_and_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for part in ("which attention kernels", "Exit status: 0", "examples:", "--measure", "--rates FILE", "MODEL"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 120


def test_rates_are_printed_in_units_that_people_know() -> None:
    lines = "\n".join(cli_check.rates_lines(GPUS["h100"], (52e9, 55e9)))
    for part in ("670.0 TFLOP/s", "650.0 TFLOP/s forward, 594.0 backward", "3,000 GB/s", "52.0 GB/s to the GPU, 55.0"):
        assert part in lines


def test_plan_takes_rates_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, twice = tmp_path / "gpu.json", GPUS["h100"]
    rates = {dim: (2 * f, 2 * b) for dim, (f, b) in twice.attention.items()}
    mine = replace(twice, name="my GPU", attention=rates, matmul=2 * twice.matmul, memory=2 * twice.memory)
    save_rates(mine, path)
    arguments = ["plan", "--host-mem", "128", "--seq-len", "256K", "--json"]
    seconds = []
    for extra in ([], ["--rates", str(path)]):
        assert main([*arguments, *extra]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["seconds"])
    assert seconds[1] == pytest.approx(seconds[0] / 2) and read_rates(path).name == "my GPU"
    path.write_text("{}")
    assert main([*arguments, "--rates", str(path)]) == 2 and "no rates in it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_copy_is_right_here(
    kind: str, folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside plain PEFT over bitsandbytes, both against the dequantised copy in float64."""
    pytest.importorskip("bitsandbytes")
    status, out, _ = run(capsys, folder("llama", **GROUPED), "--quantize", kind)
    assert status == 0 and "lora_" in out and "right with every kernel that is here" in out
