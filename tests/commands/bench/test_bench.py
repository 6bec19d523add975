"""`hf-fpdt bench`: the real command with real processes on a CPU; a wrong stack never gets a speed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, LlamaConfig

from hf_fpdt.commands.accuracy import Worst, worst
from hf_fpdt.commands.bench import child
from hf_fpdt.commands.bench.ceiling import measure_ceiling
from hf_fpdt.commands.bench.driver import Bench
from hf_fpdt.commands.bench.figures import Rates, Trained
from hf_fpdt.commands.bench.job import Job
from hf_fpdt.commands.bench.parity import check
from hf_fpdt.commands.bench.ranks import World
from hf_fpdt.commands.bench.report import OK, Files
from hf_fpdt.commands.bench.stacks.base import Stack, Unavailable
from hf_fpdt.commands.bench.stacks.catalogue import STACKS, Fpdt, stack_named
from hf_fpdt.commands.bench.stacks.hugging_face import HuggingFace, Liger, OffloadedHuggingFace
from hf_fpdt.commands.bench.stacks.trl_loss import chunked_nll
from hf_fpdt.commands.bench.steps import measure
from hf_fpdt.commands.main import main
from hf_fpdt.commands.options import corpus_of
from hf_fpdt.model.shapes import training_of
from hf_fpdt.plan.operations import attention_of_all
from tests.helpers import bench_stacks
from tests.helpers.app_support import run_python
from tests.helpers.support import assert_rejects, relative_error

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 4096}
JOB = Job(
    kind="parity",
    stack="",
    model="",
    shape="",
    layers=None,
    full=False,
    tokens=(),
    steps=1,
    chunk_tokens=None,
    device="cpu",
    dtype="float32",
)


def folder(path: Path, family: str = "llama") -> str:
    config: Any = LlamaConfig(**SIZES, num_key_value_heads=2) if family == "llama" else GPTNeoXConfig(**SIZES)
    config.save_pretrained(path / family)
    return str(path / family)


def job(path: Path, family: str = "llama", **changes: Any) -> Job:
    return Job(**{**vars(JOB), "model": folder(path, family), **changes})


@pytest.mark.slow
def test_the_command_measures_what_is_right_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    broken = "tests.helpers.bench_stacks:WrongScale"
    names = ["fpdt", broken]  # the others are held against the truth below
    files = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    options = ["--seq-len", "600", "--chunk-tokens", "256", "--steps", "2", "--dtype", "float32", "--limit", "200"]
    output = ["--csv", str(files[0]), "--json", str(files[1])]
    done = run_python(
        "-m",
        "hf_fpdt.commands.main",
        "bench",
        folder(tmp_path),
        *options,
        *output,
        "--device",
        "cpu",
        "--stacks",
        *names,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["stack"]: row for row in csv.DictReader(files[0].read_text().splitlines())}
    assert list(rows) == names
    for name in names[:1]:
        row = rows[name]
        assert row["result"] == "ok" and float(row["tokens_per_s"]) > 0 and float(row["parity"]) <= 2
        assert row["strict_mfu"] == "" and row["peak_device_gib"] == "", "a CPU has no peak and no device memory"
        assert float(row["of_ceiling"]) > 0 and float(row["peak_rss_gib"]) > 0.1
        assert float(row["predicted_device_gib"]) > float(row["predicted_pinned_gib"]) == 0 and not row["predicted_s"]
        assert row["trained"].startswith("LoRA") and row["dtype"] == "float32" and "torch" in row["versions"]
    assert rows[broken]["result"].startswith("wrong, so no speed") and rows[broken]["tokens_per_s"] == ""
    assert [json.loads(line)["stack"] for line in files[1].read_text().splitlines()] == names
    assert "strict MFU: S" in done.stdout and "wrong, so no speed" in done.stdout


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_right_stacks_pass_and_wrong_ones_do_not(tmp_path: Path, family: str, full: bool) -> None:
    task = job(tmp_path, family, full=full)

    def verdict(stack: Stack) -> None:
        parity = check(stack, task)
        assert parity.passed, parity

    for stack in (Fpdt(), HuggingFace(), OffloadedHuggingFace()):
        verdict(stack)
    assert_rejects(
        verdict,
        {
            kind.__name__: kind()
            for kind in (
                bench_stacks.WrongScale,
                bench_stacks.ShiftedLabels,
                bench_stacks.LostChunk,
                bench_stacks.MeanOverAll,
                bench_stacks.NoGradients,
            )
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_bfloat16_does_not_hide_a_wrong_scale(tmp_path: Path, full: bool) -> None:
    task = job(tmp_path, dtype="bfloat16", full=full)
    assert check(Fpdt(), task).passed
    assert not check(bench_stacks.WrongScale(), task).passed


def test_liger_says_why_it_cannot_run_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"[Ll]iger"):
        check(Liger(), job(tmp_path))


def test_a_stack_that_is_none_is_named() -> None:
    for name in ("fast", "tests.helpers.bench_stacks:Missing", "no.such.module:Stack"):
        with pytest.raises(Unavailable, match="fpdt, fpdt-host, hf, liger"):
            stack_named(name)


def test_rows_are_added_to_a_file_of_the_same_columns_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for name in ("a", "b"):
        Files(path, None).add({"stack": name, "tokens": 1, "result": "ok", "loss": 1.5})
    assert [row["stack"] for row in csv.DictReader(path.read_text().splitlines())] == ["a", "b"]
    path.write_text("mine\n")
    with pytest.raises(FileExistsError, match="other columns"):
        Files(path, None)


def test_a_nan_never_passes() -> None:
    nan = float("nan")
    for ours, naive in (({"loss": nan}, {"loss": 1.0}), ({"loss": 0.1, "w": nan}, {"loss": 1.0, "w": 1.0})):
        assert not worst(ours, naive, dict.fromkeys(ours, 1e-9)).passed
    assert worst({"w": 2.0}, {"w": 1.0}, {"w": 0.0}) == Worst("w", 2.0) and Worst("w", 2.0).passed


def test_the_loss_in_chunks_is_the_loss() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 37, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 50, bias=False, dtype=torch.float64)
    labels = torch.randint(0, 50, (2, 37))
    labels[:, :9] = -100
    loss = chunked_nll(hidden, head, labels, chunk_tokens=16)
    expected = F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
    inputs = (hidden, head.weight)
    for ours, truth in zip(
        (loss, *torch.autograd.grad(loss, inputs)),
        (expected, *torch.autograd.grad(expected, inputs)),
        strict=True,
    ):
        assert relative_error(ours, truth) < 1e-12


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has"),
            "out of GPU memory: CUDA out",
        ),
        (MemoryError("hf_fpdt: too much"), "does not fit: too much"),
        (Unavailable("no package"), "cannot run: no package"),
        (ArithmeticError("the loss is nan."), "wrong, so no speed: the loss is nan."),
    ],
)
def test_what_can_be_understood_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fails(job: Job, world: World) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(child, "work", fails)
    monkeypatch.setattr(child, "_go_first", lambda: None)
    JOB.write(tmp_path / "job")
    child.main(str(tmp_path / "job"), str(tmp_path / "result"))
    outcome = json.loads((tmp_path / "result").read_text())
    assert outcome["reason"].startswith(reason) and outcome["found"]["commit"]


def test_the_help_names_every_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and kind.about in text for name, kind in STACKS.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--csv", "/no/such/folder/x.csv"], "cannot be written"),
        (["--device", "cuda"], "finds no CUDA GPU"),
        (["--seq-len", "many"], "number of tokens"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(["bench", *options])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("results", "status"), [(["out of memory"] * 2, 1), (["out of memory", OK], 0), ([], 1)])
def test_the_status_says_whether_anything_was_measured(
    results: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"stack": "hf", "tokens": 1024, "result": result, "commit": "", "date": ""} for result in results]
    monkeypatch.setattr(Bench, "rows", lambda _: iter(rows))
    monkeypatch.setattr("hf_fpdt.commands.bench.command.as_table", lambda _: "")
    monkeypatch.setattr("hf_fpdt.commands.bench.command.conditions_line", lambda _: "")
    assert main(["bench", folder(tmp_path), "--device", "cpu"]) == status


@pytest.mark.gpu
def test_steps_do_without_memory_that_is_held(tmp_path: Path) -> None:
    task = job(tmp_path, kind="step", tokens=(512,), device="cuda", dtype="bfloat16")
    peaks = [measure(HuggingFace(), replace(task, held_gib=held))["peak_device_gib"] for held in (0.0, 1.5)]
    assert peaks[1] - peaks[0] == pytest.approx(1.5, abs=0.05)


def test_packed_rows_are_held_against_plain_hugging_face_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents of both are told apart by positions; the ceiling is of the pairs that are computed."""
    task = job(tmp_path, documents="lognormal:200,1")

    def verdict(stack: Stack) -> None:
        assert check(stack, task).passed

    verdict(Fpdt())
    assert_rejects(verdict, {"documents see each other": bench_stacks.SeesOtherDocuments()})
    found = measure(Fpdt(), replace(task, kind="step", tokens=(600,), chunk_tokens=256))
    assert found["step_s"] > 0 and found["loss"] == pytest.approx(
        measure(Fpdt(), replace(task, tokens=(600,)))["loss"]
    )
    assert found["loss"] != pytest.approx(measure(Fpdt(), replace(task, tokens=(600,), documents=None))["loss"])
    rates = measure_ceiling(replace(task, kind="ceiling", tokens=(600,)))
    assert rates["attention"]["600"][0] > 0
    sizes = training_of(LlamaConfig(**SIZES, num_key_value_heads=2), lora=False)
    plain, packed = (
        Trained(sizes=sizes.model, vocabulary=128, full=False, documents=each)
        for each in (None, corpus_of("lognormal:200,1"))
    )
    known = Rates(forward=1e9, backward=1e9, matmul=1e9, kernel="")
    fewer = attention_of_all(sizes.model, 600) - attention_of_all(
        sizes.model, 600, corpus_of("lognormal:200,1").row(600)
    )
    saved = plain.ceiling_seconds(600, known) - packed.ceiling_seconds(600, known)
    assert saved == pytest.approx(3.5 * fewer / 1e9) and plain.strict(600) - packed.strict(600) == pytest.approx(
        3 * fewer
    )
    with pytest.raises(Unavailable, match="--documents lognormal:200,1: the stack hf is measured on one document"):
        HuggingFace.check_packs("lognormal:200,1")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_quantised_weights_both_are_held_against_the_dequantised_ones(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    task = job(tmp_path, quantised=kind)
    assert check(Fpdt(), task).passed
    assert not check(bench_stacks.WrongScale(), task).passed


def test_a_quantised_step_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = measure(Fpdt(), job(tmp_path, kind="step", tokens=(300,), chunk_tokens=128, quantised="nf4"))
    assert found["step_s"] > 0 and found["predicted_device_gib"] > 0
