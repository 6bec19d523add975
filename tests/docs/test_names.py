"""Dotted names of the package that texts give, in pages, docstrings and messages, are there."""

from __future__ import annotations

import re
from functools import cache
from pkgutil import resolve_name

import pytest

from tests.docs.test_links import PAGES, ROOT
from tests.helpers.support import assert_rejects

# The changelog and the notebooks name what was.
TEXTS = sorted(
    {page for page in PAGES if page != "CHANGELOG.md" and not page.startswith("docs/results/")}
    | {str(path.relative_to(ROOT)) for path in (ROOT / "hf_fpdt").rglob("*.py")}
)
NAME = re.compile(r"\bhf_fpdt(?:\.[A-Za-z_]\w*)+")


@cache
def is_there(name: str) -> bool:
    """A module, or what it has; a module itself is not imported, as it may need a GPU's packages."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or path.is_dir():
            return length == len(parts) or _has(".".join(parts[:length]), ".".join(parts[length:]))
    return False


def _has(module: str, attribute: str) -> bool:
    try:
        resolve_name(f"{module}:{attribute}")
    except AttributeError:
        return False
    return True


def check_names(text: str) -> None:
    missing = sorted({name for name in NAME.findall(text) if not is_there(name)})
    assert not missing, missing


@pytest.mark.parametrize("folder", ["pages", "package"])
def test_names_that_texts_give_are_there(folder: str) -> None:
    found = [ROOT / text for text in TEXTS if text.endswith(".md") == (folder == "pages")]
    assert len(found) > 10
    for path in found:
        check_names(path.read_text(encoding="utf-8"))


def test_names_that_are_not_there_are_found() -> None:
    check_names("`hf_fpdt.attention.KERNELS`, hf_fpdt.commands.bench.stacks.base.Stack, hf_fpdt.engine.")
    wrong = ("hf_fpdt.kernels", "hf_fpdt.bench.child", "hf_fpdt.plan.StepSize")
    assert_rejects(check_names, {name: f"`{name}`" for name in wrong})
