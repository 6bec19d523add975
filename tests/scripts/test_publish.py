"""Tables of the pages are those of the CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_pictures import PICTURES, draw, draw_reach, draw_scaling
from bench_results import ROOT, read, read_json, read_step
from publish import LONGER, PAGES, REACH, SEVERAL, publish, reach_table, steps_table, table


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_what_the_files_say(page: str, tmp_path: Path) -> None:
    assert not publish(ROOT / page, check=True)
    text = (ROOT / page).read_text(encoding="utf-8")
    fastest = next(row for row in read("lora-8b-h100") if (row["stack"], row["tokens"]) == ("fpdt", "131072"))
    figure = f"{float(fastest['tokens_per_s']):,.0f}"
    assert f"| {figure} |" in text
    changed = tmp_path / "page.md"
    changed.write_text(text.replace(f"| {figure} |", "| 9,999 |"), encoding="utf-8")
    assert publish(changed, check=True) and "9,999" in changed.read_text(encoding="utf-8")
    assert publish(changed, check=False) and changed.read_text(encoding="utf-8") == text


def test_files_without_a_column_for_gpus_are_of_one() -> None:
    header, _, first, *_ = table("full-1b-h100", "columns=stack,gpus,tokens").splitlines()
    assert (header, first) == ("| stack | GPUs | tokens |", "| `fpdt` | 1 | 131,072 |")
    assert "GPUs" not in table("full-1b-h100", "").splitlines()[0]


def test_what_does_not_fit_says_so_and_is_drawn(tmp_path: Path) -> None:
    assert "| `hf` | out of GPU memory |" in (ROOT / "docs/results/benchmarks.md").read_text(encoding="utf-8")
    for name in PICTURES:
        draw(name, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_step_has_what_was_measured_beside_what_was_predicted() -> None:
    header, _, line = steps_table(["1m-4xh200"]).splitlines()
    assert header.count("|") == line.count("|") and "431.3 (436.0)" in line and "0.525" in line
    step = read_json("1m-4xh200")
    device, host = step["measured"]["predicted_device_gib"], step["foretold"]["host_bytes"] / 2**30
    assert f"({device:.1f})" in line and f"({host:.1f})" in line
    assert line in (ROOT / "docs/results/benchmarks.md").read_text(encoding="utf-8")
    fewer = steps_table(["1m-8-layers-h100"])
    assert "| llama-8b, 8 layers |" in fewer and "8 layers" not in line


def test_long_steps_are_rows_after_those_of_the_file() -> None:
    lines = table("longest-8b-h100", "columns=stack,tokens,step_s result=ok steps=512k-h100,768k-h100").splitlines()
    assert lines[0] == "| stack | tokens | step s |" and len(lines) == 2 + 4 + 2
    assert lines[-1] == "| `fpdt` | 786,432 | 1,100.21 |"
    everything = table("longest-8b-h100", "columns=stack,tokens,step_s")
    assert "| `hf-offload` | 258,048 | out of GPU memory |" in everything and "out of" not in "".join(lines)
    assert len(table("longest-8b-h100", "stack=hf,liger").splitlines()) == 2 + 2


def test_reach_is_the_longest_of_each_stack_beside_its_speed_at_one_length() -> None:
    lines = reach_table("longest-8b-h100", "beside=lora-8b-h100 tokens=131072 steps=512k-h100,768k-h100").splitlines()
    assert lines[0].endswith("| tokens/s at 131,072 |") and len(lines) == 2 + 5
    assert lines[2] == "| Hugging Face, every layer checkpointed | 36,864 | 7.23 | out of GPU memory |"
    assert lines[-1] == "| **hf_fpdt** | 786,432 | 1,100.21 | 3,622 |"


def test_how_far_each_goes_is_drawn_with_the_longer_steps(tmp_path: Path) -> None:
    names, steps = REACH
    sizes = []
    for more in (steps[:1], steps):
        draw_reach(names, more, tmp_path / "x.png")
        sizes.append((tmp_path / "x.png").read_bytes())
    assert len(sizes[0]) > 10_000 and sizes[0] != sizes[1]


def test_scaling_is_drawn_with_the_longer_steps(tmp_path: Path) -> None:
    step = read_step("1m-4xh200")
    assert (step["tokens"], step["gpus"]) == ("1048576", "4")
    assert float(step["tokens_per_s"]) * 431.3 == pytest.approx(2**20, rel=1e-3)
    sizes = []
    for steps in ((), LONGER):
        draw_scaling(SEVERAL, steps, tmp_path / "x.png")
        sizes.append((tmp_path / "x.png").stat().st_size)
    assert 10_000 < sizes[0] < sizes[1], "more points, more ink"
