"""The numbers of a trace equal those worked out by hand, the picture is written, and the command refuses clearly."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig

from hf_fpdt import FPDTPlugin
from hf_fpdt.commands import main as cli
from hf_fpdt.commands.pictures import PictureError
from hf_fpdt.commands.trace import command as cli_trace
from hf_fpdt.commands.trace import picture as trace_picture
from hf_fpdt.commands.trace import recording
from hf_fpdt.commands.trace.intervals import clipped, complement, merged, outside, total
from hf_fpdt.commands.trace.timeline import Timeline, TraceError, kernel_class, middle_layer
from hf_fpdt.commands.trace.trace_file import metadata, read_trace
from tests.helpers import traces
from tests.helpers.support import assert_rejects

FORWARD = {
    "span": 90.0,
    "busy": 89.0,  # [0, 61) and [62, 90): two streams of kernels overlap in [55, 60)
    "h2d": (4, 2.05, 36.0, 0.5),  # [10, 35), [60.5, 61.5), and [80, 100) of which half is the pass's
    "d2h": (1, 0.05, 2.0, 0.75),
}
BACKWARD = {"span": 100.0, "busy": 99.95, "h2d": (1, 0.5, 10.0, 0.0), "d2h": (0, 0.0, 0.0, 0.0)}


def timelines(path: Path, builder: traces.TraceBuilder) -> list[Timeline]:
    return middle_layer(read_trace(traces.write(builder.content(), path / "trace.json.gz")))


def numbers(timeline: Timeline) -> dict[str, Any]:
    found: dict[str, Any] = {"span": timeline.span_ms, "busy": timeline.busy_ms}
    for kind in ("h2d", "d2h"):
        c = timeline.copies(kind)
        found[kind] = (c.count, c.gigabytes, c.busy_ms, c.exposed_ms)
    return found


def assert_forward(found: dict[str, Any]) -> None:
    for name, value in FORWARD.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("marked", [True, False], ids=["marked on the device", "found by launches"])
def test_numbers_are_those_worked_out_by_hand(tmp_path: Path, marked: bool) -> None:
    forward, backward = timelines(tmp_path, traces.small_trace(marked=marked))
    assert forward.name == "Forward of layer 1 (LlamaDecoderLayer)"
    if not marked:  # without marks the pass is what was launched in it, on whatever stream
        assert forward.phase.end_ms - forward.phase.start_ms == pytest.approx(90.0)
    assert_forward(numbers(forward))
    assert forward.copies("h2d").gb_per_s == pytest.approx(2.05 / 0.036)
    assert forward.copies("d2h").covered == pytest.approx(1 - 0.75 / 2)
    for name, value in BACKWARD.items():
        assert numbers(backward)[name] == pytest.approx(value, abs=1e-6), name


def test_wrong_sums_are_rejected(tmp_path: Path) -> None:
    forward, _ = timelines(tmp_path, traces.small_trace())
    a, phase = forward.activities, forward.phase
    kernels = [x for x in a if x.kind == "kernel"]
    swapped = {"h2d": "d2h", "d2h": "h2d"}
    inside = [total(clipped([(k.start_ms, k.end_ms)], forward.window)) for k in kernels]
    whole = numbers(forward)["h2d"]
    variants = {
        "overlaps not merged": {**numbers(forward), "busy": sum(inside)},
        "copies counted twice": numbers(replace(forward, activities=a + tuple(x for x in a if x.kind == "h2d"))),
        "directions swapped": numbers(
            replace(forward, activities=tuple(replace(x, kind=swapped.get(x.kind, x.kind)) for x in a))
        ),
        "one stream of kernels": numbers(
            replace(forward, activities=tuple(x for x in a if x.stream != traces.OTHER_COMPUTE))
        ),
        "copies inside the device are computation": numbers(
            replace(forward, activities=tuple(replace(x, kind="kernel") if x.kind == "d2d" else x for x in a))
        ),
        "edges not cut": {**numbers(forward), "h2d": (whole[0], 2.55, 46.0, whole[3])},
        "the host's window": numbers(replace(forward, phase=replace(phase, start_ms=480.0, end_ms=530.0))),
    }
    assert_rejects(assert_forward, variants)


def test_what_gpus_send_each_other_is_no_computation(tmp_path: Path) -> None:
    t = traces.small_trace()
    t.kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 1050, 1061.5, traces.OTHER_COMPUTE)
    forward, backward = timelines(tmp_path, t)
    assert_forward(numbers(forward))  # as without
    found = forward.copies("peers")
    assert found.count == 1
    assert (found.busy_ms, found.exposed_ms) == pytest.approx((11.5, 0.5))
    assert "between GPUs" in forward.summary() and "between GPUs" not in backward.summary()
    trace_picture.draw([forward, backward], tmp_path / "x.png", "title", "conditions")
    assert len(colours_of(tmp_path / "x.png")) > 20


def test_what_takes_longer_than_the_shortest_of_its_size_waits(tmp_path: Path) -> None:
    t = traces.small_trace()
    t.exchange(10, 11, 1000)  # in another pass
    t.exchange(1061.2, 1061.5, 10)
    t.exchange(1065, 1069, 1000)
    t.exchange(1075, 1076.5, 1000)
    forward, backward = timelines(tmp_path, t)
    assert forward.copies("peers").waiting_ms == pytest.approx(3 + 0.5)
    assert "3.50 ms waiting for another GPU" in forward.summary() and "waiting" not in backward.summary()
    assert forward.copies("h2d").waiting_ms == 0
    trace_picture.draw([forward, backward], tmp_path / "x.png", "title", "conditions")


def test_a_gap_is_named_beside_its_mark_where_no_other_mark_is() -> None:
    free = trace_picture._free_side
    assert free(50, [50], 100) == 1 and free(50, [50, 53], 100) == -1 and free(50, [47, 50, 53], 100) == 0
    assert free(50, [40, 50, 60], 100) == 1 and free(97, [97], 100) == -1 and free(2, [2, 5], 100) == 0


def test_gaps_say_when_and_what_was_under_way(tmp_path: Path) -> None:
    forward, backward = timelines(tmp_path, traces.small_trace())
    (gap,) = forward.gaps()
    assert (gap.start_ms, gap.length_ms) == pytest.approx((61.0, 1.0))
    assert gap.before == traces.ELEMENTWISE and gap.after == traces.GEMM
    assert gap.copies == ("d2d", "d2h", "h2d")
    assert backward.gaps() == [] and len(backward.gaps(longer_than_ms=0.01)) == 1
    text = forward.summary()
    assert (
        "1.00 ms at 61.0 ms, after at::native::vectorized_elementwise_kernel, before matrix products; inside" in text
    )
    assert "0.75 ms not covered" in text


def test_the_last_step_is_taken_and_a_missing_pass_left_out(tmp_path: Path) -> None:
    t = traces.small_trace()
    t.events = [e for e in t.events if not e["name"].startswith("fpdt::backward")]
    (forward,) = timelines(tmp_path, t)
    # The trace's time starts with its first device activity, at 49.5 ms.
    assert forward.window == pytest.approx((950.5, 1040.5))


def test_kernel_time_by_class(tmp_path: Path) -> None:
    forward, backward = timelines(tmp_path, traces.small_trace())
    expected = {"attention forward": 40.0, "matrix products": 48.0, "other kernels": 6.0}
    assert forward.class_ms() == pytest.approx(expected)
    assert backward.class_ms() == pytest.approx({"attention backward": 60.0, "matrix products": 39.95})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (traces.FORWARD, "attention forward"),
        (traces.BACKWARD, "attention backward"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128> >", "attention forward"),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true>", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention backward"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention forward"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80", "attention backward"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matrix products"),
        (traces.GEMM, "matrix products"),
        (traces.ELEMENTWISE, "other kernels"),
        ("void at::native::reduce_kernel<512, 1>", "other kernels"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, expected: str) -> None:
    assert kernel_class(name) == expected


def test_intervals() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4), (7, 7)]) == [(0, 4), (5, 6)]
    assert complement([(1, 2), (3, 4)], (0, 5)) == [(0, 1), (2, 3), (4, 5)]
    assert complement([], (0, 5)) == [(0, 5)] and complement([(0, 5)], (0, 5)) == []
    assert outside([(0, 4), (6, 9)], [(1, 2), (3, 7)]) == [(0, 1), (2, 3), (7, 9)]
    assert outside([], [(0, 1)]) == [] and outside([(0, 1)], []) == [(0, 1)]


# Files ---------------------------------------------------------------------------------------------------------------


def test_title_and_conditions_pass_through_the_profiler(tmp_path: Path) -> None:
    t = traces.small_trace()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("fpdt::forward layer 0 (X)"):
            torch.ones(3).add_(1)
        profiler.add_metadata_json(*metadata('a "b" \\ c, é', "one; two"))
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    content = json.loads((tmp_path / "cpu.json").read_bytes())
    content["traceEvents"] += t.events
    found = read_trace(traces.write(content, tmp_path / "both.json"))
    assert (found.title, found.conditions) == ("a 'b' / c, é", "one; two")
    assert "fpdt::forward layer 0 (X)" in {a.name for a in found.annotations}


def test_a_bare_list_of_events_is_read_too(tmp_path: Path) -> None:
    path = traces.write(traces.small_trace().content()["traceEvents"], tmp_path / "list.json")
    assert_forward(numbers(middle_layer(read_trace(path))[0]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no json", "is no JSON"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (b'{"a": 1}', "no list of trace events"),
        (b"3", "no list of trace events"),
        (b'{"traceEvents": []}', "no device activity"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "x.json")


def test_a_trace_without_layers_is_refused(tmp_path: Path) -> None:
    t = traces.TraceBuilder()
    t.kernel(traces.GEMM, 0, 1)
    t._add("user_annotation", "fpdt::loss", (0, 1), (traces.HOST, traces.THREAD))
    with pytest.raises(TraceError, match="no layer is marked"):
        timelines(tmp_path, t)


# The picture ---------------------------------------------------------------------------------------------------------


def colours_of(path: Path) -> dict[str, int]:
    """Pixels by colour, as #RRGGBB."""
    from matplotlib.image import imread

    red, green, blue = (imread(path)[..., :3] * 255).round().astype("int64").transpose(2, 0, 1)
    found, counts = torch.from_numpy(red * 65_536 + green * 256 + blue).unique(return_counts=True)
    return {f"#{rgb:06X}": n for rgb, n in zip(found.tolist(), counts.tolist(), strict=True)}


def test_the_picture_shows_each_kind_in_its_colour(tmp_path: Path) -> None:
    found = timelines(tmp_path, traces.small_trace())
    trace_picture.draw(found, tmp_path / "x.png", "title", "conditions")
    pixels = colours_of(tmp_path / "x.png")
    assert len(pixels) > 20
    # More than the legend's square of each.
    assert all(pixels.get(colour, 0) > 500 for colour in trace_picture.COLOURS.values()), pixels


def test_a_long_trace_makes_a_small_picture(tmp_path: Path) -> None:
    found = timelines(tmp_path, traces.long_trace(n_chunks=24, chunk_ms=2.0))
    assert sum(len(timeline.activities) for timeline in found) > 3000
    trace_picture.draw(found, tmp_path / "x.svg", "title")
    assert (tmp_path / "x.svg").stat().st_size < 1_000_000


def test_columns_show_what_fills_most_of_them() -> None:
    shown = (0.0, float(trace_picture.COLUMNS))
    parts = {"a": [(0.0, 1.7), (4.0, 4.4)], "b": [(1.7, 2.0), (2.4, 3.0)]}
    assert trace_picture._runs(parts, shown, floor=0.5) == {"a": [(0.0, 2.0)], "b": [(2.0, 3.0)]}
    assert trace_picture._runs(parts, shown, floor=0.02)["a"] == [(0.0, 2.0), (4.0, 5.0)]


def test_without_matplotlib_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PictureError, match="pip install matplotlib"):
        trace_picture.draw([], tmp_path / "x.png", "title")


# The command ---------------------------------------------------------------------------------------------------------


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = int(str(stop.code))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_kept_trace_is_drawn_again_by_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = traces.small_trace().content(hf_fpdt={"title": "One layer", "conditions": "by hand"})
    source = traces.write(content, tmp_path / "step.json.gz")
    status, out, err = run_cli(capsys, "trace", "--from", source, "--out", tmp_path / "step.png")
    assert status == 0, err
    assert "Forward of layer 1" in out and "Backward of layer 1" in out
    assert len(colours_of(tmp_path / "step.png")) > 20


def test_nobody_needs_to_read_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with `| head -1`, which ends before the text does."""
    source = traces.write(traces.small_trace().content(), tmp_path / "step.json.gz")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", nobody)
        assert cli.main(["trace", "--from", str(source), "--out", str(tmp_path / "step.png")]) == 1
    assert not capfd.readouterr().err


def test_a_missing_trace_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run_cli(capsys, "trace", "--from", tmp_path / "missing.json")
    assert status == 2 and "missing.json cannot be read" in err and err.count("\n") == 1 and not out


def test_a_trace_without_device_activity_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = traces.write({"traceEvents": []}, tmp_path / "cpu.json")
    status, out, err = run_cli(capsys, "trace", "--from", source)
    assert status == 2 and "no device activity" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-9t"], "llama-8b"),
        (["--seq-len", "long"], "8192, 32K, 1M"),
        (["--seq-len", "0"], "from 1 was expected"),
        (["--layers", "0"], "from 1 was expected"),
        (["--device-budget-gib", "much"], "number of GiB"),
        (["--out", "nowhere/x.png"], "nowhere is none"),
        (["--out", "x.jpeg"], "ends in .png"),
        (["--from", "x.json", "--json", "y.json"], "leave one out"),
        (["some/model", "--shape", "llama-1b"], "not allowed with"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, _, err = run_cli(capsys, "trace", *arguments)
    assert status == 2 and message in err


def test_a_machine_without_a_gpu_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run_cli(capsys, "trace")
    assert status == 2 and not out and err.count("\n") == 1 and "CUDA GPU" in err and "--from" in err


def test_a_missing_or_unfit_model_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for model, message in ((tmp_path / "none", "none"), (tmp_path, "a causal language model is expected")):
        status, _, err = run_cli(capsys, "trace", model)
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_model_folder_gives_the_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("FPDT_SP_SIZE", "4")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}')
    options = cli._parser().parse_args(["trace", str(tmp_path), "--seq-len", "64K", "--layers", "2", "--full"])
    wanted = cli_trace._recording(options)
    assert wanted.config.hidden_size == 64 and wanted.config.num_hidden_layers == 2
    assert wanted.n_tokens == 65_536 and not wanted.lora
    plugin = wanted.plugin
    assert (plugin.sp_size, plugin.chunk_tokens, plugin.device_budget_gib) == (1, 32_768, 0.0)


def test_out_of_memory_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_out(wanted: object, path: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli_trace, "record_step", run_out)
    status, _, err = run_cli(capsys, "trace", "--out", tmp_path / "x.png")
    assert status == 2 and "CUDA out of memory" in err and "smaller --seq-len" in err


def test_help_leads_to_the_sub_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_cli(capsys, "--help")
    assert status == 0 and "trace" in out
    status, out, _ = run_cli(capsys, "trace", "--help")
    assert status == 0 and "--from" in out and "random" in out
    assert run_cli(capsys)[0] == 2


def test_a_step_is_recorded_with_its_conditions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it but the GPU, whose activities are put in by hand."""
    monkeypatch.setattr(recording, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 80}
    config = LlamaConfig(num_hidden_layers=3, **sizes)
    plugin = FPDTPlugin(chunk_tokens=16, checkpoints="attention")
    wanted = recording.Recording(name="a model", config=config, n_tokens=64, lora=True, plugin=plugin)
    recording.record_step(wanted, tmp_path / "step.json")
    content = json.loads((tmp_path / "step.json").read_bytes())
    assert any(event.get("cat") == "cpu_op" for event in content["traceEvents"])
    content["traceEvents"] += traces.small_trace().events
    found = read_trace(traces.write(content, tmp_path / "both.json"))
    assert found.title == "One decoder layer of a model, 64 tokens"
    for text in ("a GPU", "3 layers", "LoRA r=16", "chunk_tokens 16", "checkpoints attention", "torch 2", "commit "):
        assert text in found.conditions, text


@pytest.mark.gpu
def test_a_step_is_recorded_on_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--shape", "llama-1b", "--layers", "2", "--seq-len", "16K", "--chunk-tokens", "4K"]
    kept, picture = tmp_path / "step.json.gz", tmp_path / "step.png"
    status, out, err = run_cli(capsys, "trace", *arguments, "--json", kept, "--out", picture)
    assert status == 0, err
    forward, backward = middle_layer(read_trace(kept))
    assert forward.class_ms()["attention forward"] > 0 and backward.class_ms()["attention backward"] > 0
    # The budget is 0: K and V come from the host.
    assert forward.copies("d2h").count > 0 and backward.copies("h2d").count > 0
    assert "Backward of layer 1" in out and len(colours_of(picture)) > 20
