"""The tables of a plan: its numbers, all of them, whole at every width, with nothing that a file should not hold."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, Group, RenderableType

from hf_fpdt.commands.plan.command import _console
from hf_fpdt.commands.plan.tables import USE_NAMES, _layers, _limit, _runs, _time, as_json, plan_tables
from hf_fpdt.forecast.fit import Machines, PlannedStep, fit
from hf_fpdt.forecast.searches import More
from hf_fpdt.plan.checkpointing import KeptChunks, KeptLayers
from hf_fpdt.plan.model_sizes import LayerMix, LinearSize, StateSize
from hf_fpdt.units import GIB
from tests.forecast.test_curves import CASES
from tests.helpers.stores import TINY, step_of

HELPS = {More.HOST_MEMORY: 1_048_576, More.GPU_MEMORY: 3_000_000}


def text_of(*parts: RenderableType, width: int = 80) -> str:
    file = StringIO()
    Console(file=file, width=width, force_terminal=False).print(*parts)
    return file.getvalue()


def rows_of(text: str) -> list[list[str]]:
    """Cells of every line: what two blanks or more part."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


@pytest.fixture(params=CASES, ids=str)
def planned(request: pytest.FixtureRequest) -> tuple[PlannedStep, Machines]:
    training, machines, n_tokens = CASES[request.param]
    return fit(training, machines, n_tokens), machines


def test_numbers_are_whole_at_every_width(planned: tuple[PlannedStep, Machines]) -> None:
    found, machines = planned
    # Longer lines than any plan should have.
    kept = KeptLayers((True, True, False) * 42, (True, False, True, False, False, False) * 21)
    plan = replace(found.plan, forecast=replace(found.plan.forecast, kept=kept))
    long = replace(found, plan=plan, seconds=7_199.9, copy_seconds=12_345_678.9, host=98_765 * GIB)
    tables = Group(*plan_tables(long, machines, HELPS, long))
    texts = {width: text_of(tables, width=width) for width in (80, 120, 400)}
    assert all(len(line) <= width for width, text in texts.items() for line in text.splitlines())
    numbers = [sorted(re.findall(r"\d[\d,.]*", text)) for text in texts.values()]
    assert numbers[0] == numbers[1] == numbers[2] and not re.search("\x1b|…", texts[80])


def test_the_numbers_are_the_plan_s(planned: tuple[PlannedStep, Machines]) -> None:
    found, machines = planned
    text = text_of(Group(*plan_tables(found, machines, {})))
    plan, forecast, rows = found.step.plan, found.plan.forecast, rows_of(text)
    assert [
        f"{found.seconds:,.1f} s",
        f"{plan.n_tokens / found.seconds:,.0f}",
        f"{found.strict_mfu:.3f}",
        f"{found.copy_seconds:,.1f} s, {100 * found.copy_seconds / found.seconds:.1f} %",
        f"{len(plan.chunks)} x 32,768",
        "in windows" if found.plan.kv.all_windowed else f"{found.plan.kv.backward_resident} of {len(plan.chunks)}",
    ] in rows
    assert f"{plan.n_tokens:,} tokens on {machines.gpus} x H100 80GB, " in text and machines.gpu.source in text
    sizes = [sum(size for _, size in found.device), found.host, forecast.disk_bytes][: 3 if machines.disk_bytes else 2]
    assert ["together", *(f"{size / GIB:.1f}" if size else "-" for size in sizes)] in rows
    assert ["expected peak", f"{found.peak / GIB:.1f}"] in rows
    device = {cells[0]: cells[1] for cells in rows if len(cells) > 2}
    assert all(
        device.get(USE_NAMES[use]) == (f"{size / GIB:.1f}" if size >= 0.05 * GIB else None)
        for use, size in found.device
    )


def test_what_gpus_send_each_other_is_told_where_there_are_several(planned: tuple[PlannedStep, Machines]) -> None:
    found, machines = planned
    assert ("between GPUs:" in text_of(Group(*plan_tables(found, machines, {})))) == (found.step.plan.sp_size > 1)
    plan = replace(found.step.plan, sp_size=2)
    found = replace(found, step=replace(found.step, plan=plan), exchange_seconds=12.34, gather_seconds=5.67)
    text = text_of(Group(*plan_tables(found, machines, {})))
    assert "exchanges between GPUs: 12.3 s of the step" in text
    assert "weights and gradients between GPUs: 5.7 s under" in text
    assert f"{100 * found.copy_seconds / (found.seconds - 12.34):.1f} %" in text
    without = replace(found, gather_seconds=0.0)
    assert "weights and gradients between" not in text_of(Group(*plan_tables(without, machines, {})))


def test_hosts_hold_k_v_and_checkpoints() -> None:
    training, machines, n_tokens = CASES["on the host, K and V too"]
    found = fit(training, machines, n_tokens)
    kv, rows = found.plan.kv, rows_of(text_of(Group(*plan_tables(found, machines, {}))))
    streamed = kv.host_bytes / GIB
    assert streamed > 1
    hosts = {name: float(host) for name, _, host in (cells for cells in rows if len(cells) == 3) if host[-1].isdigit()}
    assert hosts["K, V, dK, dV"] == pytest.approx(streamed, abs=0.06)
    assert hosts["checkpoints"] == pytest.approx(found.host / GIB - streamed, abs=0.06)
    assert hosts["available"] == 96.0


def test_windows_are_told_and_what_one_layer_holds_of_them() -> None:
    for name, lines in {
        "all on the device": [],
        "windows": ["6 of 8 layers see 4,096 keys"],
        "windows alone": ["8 of 8 layers see 4,096 keys"],
    }.items():
        found, machines = fit(*CASES[name]), CASES[name][1]
        text, told = text_of(Group(*plan_tables(found, machines, {}))), as_json(found, {})
        ring = max(found.plan.kv.forward_ring, found.plan.kv.backward_ring)
        assert [line for line in text.splitlines() if " layers see " in line] == lines
        assert (f"what one row reads: {ring / GIB:.2f} GiB; hosts hold none" in text) == bool(lines)
        assert told["ring_bytes"] == ring and (ring > 0) == bool(lines)
        assert told["windows"] == ([] if not lines else list(found.step.windows))
        assert (found.plan.kv.device_bytes == ring) == (name == "windows alone")


def test_of_states_no_ring_of_keys_is_told() -> None:
    found, machines = fit(*CASES["all on the device"]), CASES["all on the device"][1]
    model = found.step.model
    mixes = (LayerMix(False, 1, (StateSize("conv 0", 8),), 8), *(model.mix(0),) * (model.layers - 1))
    found = replace(found, step=replace(found.step, model=replace(model, mixes=mixes)))
    text = text_of(Group(*plan_tables(found, machines, {})))
    assert f"1 of {model.layers} layers carry a state" in text and "what one row reads" not in text


def test_heads_of_two_widths_are_told() -> None:
    training, machines, n_tokens = CASES["all on the device"]
    model = replace(training.model, head_dim=192, value_dim=128, kv_heads=32)
    for sizes, line in ((model, "heads of 192 for queries and keys, of 128 for values"), (training.model, None)):
        found = fit(replace(training, model=sizes), machines, n_tokens)
        text = text_of(Group(*plan_tables(found, machines, {})))
        assert [each for each in text.splitlines() if each.startswith("heads of")] == ([line] if line else [])
        assert (as_json(found, {})["key_dim"], as_json(found, {})["value_dim"]) == (sizes.head_dim, 128)


def test_json_keeps_its_keys_whatever_the_tables_say() -> None:
    found = as_json(fit(*CASES["two GPUs, every weight"]), {**HELPS, More.GPUS: 9_000_000})
    assert list(found["device_bytes"]) == [
        "weights",
        "gradients",
        "optimizer",
        "sums of gradients over chunks",
        "NCCL",
        "activations and gradients of a step",
        "K, V, dK, dV",
        "checkpoints",
    ]
    quarters = ["a quarter more host memory", "a quarter more GPU memory"]
    assert list(found["longest_with"]) == [*quarters, "twice the GPUs and hosts"]


def test_layers_of_one_policy_are_a_row() -> None:
    inputs, attentions = (True, False, True, True, False, True), (False, False, False, False, True, True)
    step = step_of(20, 8)
    assert rows_of(text_of(_layers(KeptLayers(inputs, attentions), step)))[2:] == [
        ["0, 2-3", "3", "kept", "run again"],
        ["1", "1", "rebuilt", "run again"],
        ["4", "1", "rebuilt", "kept"],
        ["5", "1", "kept", "kept"],
        ["together", "6", "4 kept, 2 rebuilt", "2 kept, 4 run again"],
    ]
    every = KeptLayers((True,) * 9, (True,) * 9)
    assert rows_of(text_of(_layers(every, step)))[2:] == [["0-8", "9", "kept", "kept"]]
    assert _runs([0, 2, 3, 4, 6, 7]) == "0, 2-4, 6-7"


def test_outputs_of_linears_have_a_column_by_what_they_save() -> None:
    linears = (LinearSize("q", 32, 32), LinearSize("up", 32, 96, late=True))
    step = step_of(32, 8, model=replace(TINY, linears=(linears,) * 4))
    every, none, half = KeptChunks(4, 4), KeptChunks(), KeptChunks(2, 1)
    there = (True,) * 4
    kept = KeptLayers(there, there, linears=((none, none), (every, none), (half, half), (every, every)))
    rows = rows_of(text_of(_layers(kept, step)))
    assert rows[0] == ["layers", "how many", "input", "attention output", "linears"]
    assert [row[-1] for row in rows[2:]] == ["run again", "25 % kept", "50 % kept", "kept", "44 % kept"]
    assert "linears" not in text_of(_layers(replace(kept, linears=()), step))


def test_what_ends_the_growth_and_what_would_be_longer() -> None:
    training, machines, n_tokens = CASES["all on the device"]
    found = fit(training, machines, n_tokens)
    text = text_of(Group(*plan_tables(found, machines, HELPS)))
    rows = rows_of(text)
    assert ["ends by GPU memory; longer with", "tokens", "more"] in rows
    assert ["a quarter more host memory", "1,048,576", "+700 %"] in rows and "32 query heads" in text
    more = {**HELPS, More.HOST_MEMORY: 4_000_000, More.GPUS: 9_000_000}
    assert _limit(HELPS) == "GPU memory" and _limit(more) == "host memory"
    text = text_of(Group(*plan_tables(found, machines, more)))
    assert "twice the GPUs and hosts" in text and "query heads" not in text
    assert _time(7199.0) == "7,199.0 s" and _time(7200.0) == "2.0 h"


def test_a_narrow_file_gets_whole_tables_and_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    training, machines, n_tokens = CASES["inputs rebuilt"]
    gpu = replace(machines.gpu, name="GPU [red] :boom:", source="measured [bold]here[/bold]")
    tables = Group(*plan_tables(fit(training, machines, n_tokens), replace(machines, gpu=gpu), HELPS))
    _console().print(tables)
    text = capsys.readouterr().out
    assert text == text_of(tables) and "1 x GPU [red] :boom:, 24 GiB" in text and gpu.source in text
