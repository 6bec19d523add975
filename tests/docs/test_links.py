"""Links of the pages lead somewhere: files that are there, headings that are there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A page for other folders, whose links are right there.
TEMPLATES = {"model_cards/template.md"}
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "model_cards/**/*.md")
    for page in ROOT.glob(pattern)
)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*([^)\s]+)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of the links in Markdown, those in code left out."""
    return LINK.findall(CODE.sub("``", text))


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, hyphens for spaces, no other punctuation."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of a page; a heading that comes again is numbered."""
    found, seen = set(), Counter[str]()
    blocks = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    for heading in HEADING.findall(blocks.sub("", page.read_text(encoding="utf-8"))):
        name = anchor(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return frozenset(found)


def broken(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Links of a page that lead nowhere, with the reason."""
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(root):
            yield f"{link}: outside of the repository"
        elif not target.exists():
            yield f"{link}: no such file"
        elif heading and heading not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TEMPLATES])
def test_links_lead_somewhere(page: str) -> None:
    assert not list(broken(ROOT / page))


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A, `b` & [c](d)!\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    good = ["other.md", "other.md#a-b--c", "other.md#twice-1", "#here", "https://a.b/c", "mailto:a@b"]
    bad = ["gone.md", "other.md#no-heading", "other.md#twice-2", "#gone", "../other.md"]
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n`[code](gone.md)`\n" + "\n".join(f"[a\nlink]({link})" for link in good + bad))
    assert [line.split(": ")[0] for line in broken(page, tmp_path)] == bad
