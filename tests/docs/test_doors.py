"""The Makefile and the workflow are thin: what they start is there."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_links import ROOT

TARGETS = ("test", "quick", "style", "quickstart", "tables")


@pytest.mark.parametrize("door", ["Makefile", ".github/workflows/ci.yml"])
def test_what_a_door_starts_is_there(door: str) -> None:
    started = re.findall(r"(?<![\w/])(?:\.ci|scripts|tests)/[\w./]*\w", (ROOT / door).read_text(encoding="utf-8"))
    assert started and all((ROOT / path).exists() for path in started)


def test_make_has_its_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in re.findall(r"^(\w+):", text, re.MULTILINE) if target != "help"] == list(TARGETS)
