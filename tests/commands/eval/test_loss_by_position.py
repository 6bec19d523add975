"""Loss by position: equal to plain cross entropy, with teeth; bins that cover; a figure and a csv."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.eval.curves import Curve, octave_ranges, position_bins, table_lines, write_csv
from hf_fpdt.commands.eval.figure import draw
from hf_fpdt.commands.eval.loss_by_position import measure, token_losses
from hf_fpdt.commands.main import main
from tests.helpers.app_support import stories, write_jsonl, write_tiny_checkpoint

LENGTH_TOKENS = 63


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.3, **sizes)
    config._attn_implementation = "fpdt"
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def input_ids_BS() -> Tensor:
    return torch.randint(0, 50, (2, LENGTH_TOKENS))


def plain_losses(model: LlamaForCausalLM, input_ids_BS: Tensor) -> Tensor:
    """The definition: logits of the whole sequence, cross entropy at each position."""
    logits = model(input_ids=input_ids_BS).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), input_ids_BS[:, 1:], reduction="none").float()


def agrees(losses: Tensor, expected: Tensor) -> bool:
    return losses.shape == expected.shape and torch.allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize("slice_tokens", [1, 7, 62, 1000])
def test_equals_plain_cross_entropy(model: LlamaForCausalLM, input_ids_BS: Tensor, slice_tokens: int) -> None:
    with torch.no_grad():
        expected = plain_losses(model, input_ids_BS)
    assert agrees(token_losses(model, input_ids_BS, slice_tokens), expected)


def test_equals_plain_cross_entropy_under_apply_fpdt(model: LlamaForCausalLM, input_ids_BS: Tensor) -> None:
    with torch.no_grad():
        expected = plain_losses(model, input_ids_BS)
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    losses = token_losses(model, input_ids_BS, slice_tokens=10)
    handle.remove()
    assert agrees(losses, expected)


@pytest.mark.parametrize(
    "broken",
    [lambda ids: ids.roll(1, dims=1), lambda ids: ids.roll(-1, dims=1), lambda ids: ids.flip(0)],
    ids=["one too late", "one too early", "rows exchanged"],
)
def test_the_comparison_rejects_shifted_labels(
    model: LlamaForCausalLM, input_ids_BS: Tensor, broken: Callable[[Tensor], Tensor]
) -> None:
    with torch.no_grad():
        logits = model(input_ids=input_ids_BS).logits[:, :-1]
        wrong = F.cross_entropy(logits.transpose(1, 2), broken(input_ids_BS)[:, 1:], reduction="none")
        assert not agrees(wrong, plain_losses(model, input_ids_BS))


def test_a_model_that_changes_its_logits_is_refused(
    model: LlamaForCausalLM, input_ids_BS: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(NotImplementedError, match="logits"):
        measure(model, [{"input_ids": input_ids_BS[0]}], "scaled", report=lambda _: None)


def test_measure_reports_and_restores_the_mode(model: LlamaForCausalLM, input_ids_BS: Tensor) -> None:
    lines: list[str] = []
    model.train()
    curve = measure(model, [{"input_ids": row} for row in input_ids_BS], "stock", lines.append)
    assert model.training and "window 2 of 2" in lines[-1]
    model.eval()
    assert curve.mean_loss == pytest.approx(model(input_ids=input_ids_BS, labels=input_ids_BS).loss.item(), abs=1e-5)


@pytest.mark.parametrize("length", [2, 32, 63, 64, 65, 255, 256, 257, 1000, 8192, 10_001])
def test_bins_cover_every_position_once(length: int) -> None:
    positions = [position for first, stop in position_bins(length) for position in range(first, stop)]
    assert positions == list(range(1, length))


def test_between_takes_the_positions_it_names() -> None:
    curve = Curve("c", torch.arange(1.0, 9.0)[None])  # the loss at position p is p
    assert curve.between(1, 2) == 1.0 and curve.between(3, 5) == 3.5 and curve.between(0, 9) == 4.5


def test_table_rows_start_at_the_pre_training_length() -> None:
    assert octave_ranges(8192, 512) == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
    lines = table_lines([Curve("before", torch.ones(1, 1023)), Curve("after", torch.zeros(1, 1023))], 512)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0–512", "512–1K", "all"]


def test_csv_and_figure(tmp_path: Path) -> None:
    curves = [Curve(label, torch.rand(3, 1023)) for label in ("before", "yarn only", "after")]
    write_csv(tmp_path / "curve.csv", curves)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert sum(int(row["tokens"]) for row in rows) == 3 * 1023
    assert float(rows[0]["after"]) == pytest.approx(curves[2].between(1, 32), abs=1e-5)
    draw(tmp_path / "curve.png", curves, 512, "title")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


MISTAKES = [
    (["--model", "no/such-model"], "--model: the config of 'no/such-model' can't be read"),
    (["--eval-data", "missing.txt"], "no file or folder missing.txt"),
    (["--eval-windows", "0"], "--eval_windows: A whole number from 1"),
    (["--max-length", "1"], "--max_length: got 1"),
    (["--chunk-tokens", "few"], "--chunk_tokens: got 'few'"),
    (["--output", "/proc/out"], "--output_dir: the folder /proc/out can't be made"),
    (["--eval_window", "3"], "unknown option --eval_window; did you mean --eval_windows?"),
]


@pytest.mark.parametrize(("extra", "words"), MISTAKES, ids=[extra[0] for extra, _ in MISTAKES])
def test_a_mistake_is_one_line(
    extra: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", checkpoint, "--data", __file__, "--output", tmp_path / "out", *extra]
    assert main(["eval", *map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") or words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("adapter_config", "words"),
    [("{}", "names no base model; give it with --base_model"), ('{"base_model_name_or_path": "BASE"}', "can't be")],
)
def test_a_broken_adapter_is_one_line(
    adapter_config: str, words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(adapter_config.replace("BASE", str(checkpoint)))
    command = ["--model", tmp_path, "--data", __file__, "--output_dir", tmp_path / "out"]
    assert main(["eval", *map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model: ") and error.count("\n") == 1
    assert words in error or "no readable config" in error


def test_runs_alone_and_without_matplotlib(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "held.jsonl", stories(2))
    command = ["eval", "--model", checkpoint, "--data", data, "--max_length", "256", "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 0
    assert "| all" in capsys.readouterr().out and (tmp_path / "out" / "loss_by_position.png").is_file()
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main([str(word) for word in [*command, "--output", tmp_path / "plain"]]) == 0
    printed = capsys.readouterr().out
    assert "| all" in printed and "no loss_by_position.png: the picture is drawn by matplotlib" in printed
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["loss_by_position.csv"]
