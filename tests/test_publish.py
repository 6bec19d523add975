"""Tables of the pages are those of the CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import app_support  # noqa: F401  (where scripts are)

# isort: split
from publish import PAGES, PICTURES, ROOT, draw, publish, read, table


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_what_the_files_say(page: str, tmp_path: Path) -> None:
    assert not publish(ROOT / page, check=True)
    text = (ROOT / page).read_text(encoding="utf-8")
    fastest = max(read("lora-8b"), key=lambda row: float(row["tokens_per_s"] or 0))
    figure = f"{float(fastest['tokens_per_s']):,.0f}"
    assert figure in text
    changed = tmp_path / "page.md"
    changed.write_text(text.replace(f"| {figure} |", "| 9,999 |"), encoding="utf-8")
    assert publish(changed, check=True) and "9,999" in changed.read_text(encoding="utf-8")
    assert publish(changed, check=False) and changed.read_text(encoding="utf-8") == text


def test_files_without_a_column_for_gpus_are_of_one() -> None:
    header, _, first, *_ = table("full-1b", "columns=stack,gpus,tokens").splitlines()
    assert (header, first) == ("| stack | GPUs | tokens |", "| `fpdt` | 1 | 131,072 |")
    assert "GPUs" not in table("full-1b", "").splitlines()[0]


def test_what_does_not_fit_says_so_and_is_drawn(tmp_path: Path) -> None:
    assert "| `hf` | out of GPU memory |" in (ROOT / "README.md").read_text(encoding="utf-8")
    for name in PICTURES:
        draw(name, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000
