"""README stays short and plain: a page for who has never heard of this. Figures with their conditions are in docs/."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.app_support import stories, write_tiny_checkpoint
from tests.helpers.support import assert_rejects

README = Path(__file__).resolve().parents[2] / "README.md"
MAX_LINES, MAX_NUMBERS, MAX_WORDS = 200, 3, 30
EARLY_LINES, FEW_STATEMENTS = 40, 8
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Standing for themselves: not those of names (H100, FSDP2, Llama-3.1-8B).
NUMBER = re.compile(r"(?<![\w.,-])\d[\d.,]*(?:st|nd|rd|th|[KM%])?(?![\w-])")


def paragraphs(text: str) -> list[str]:
    """Prose without code, tables, headings, comments and the targets of links; each item of a list by itself."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", text), flags=re.DOTALL)
    text = re.sub(r"^(\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    parts = re.split(r"\n\s*\n|\n(?=[*-] )", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def check_prose(text: str) -> None:
    assert len(text.splitlines()) <= MAX_LINES
    for paragraph in paragraphs(text):
        assert len(NUMBER.findall(paragraph)) <= MAX_NUMBERS, f"a table or docs/ for these numbers: {paragraph}"
        for sentence in re.split(r"[.!?:;] ", paragraph):
            assert len(sentence.split()) <= MAX_WORDS, f"two sentences, please: {sentence}"


def check_first_python(text: str) -> None:
    """The first block of Python begins and ends early, is short, and defines or imports every name it uses."""
    block = next(found for found in BLOCK.finditer(text) if found[1] == "python")
    assert text.count("\n", 0, block.end()) < EARLY_LINES
    nodes = list(ast.walk(tree := ast.parse(block[2])))
    imported = {alias.asname or alias.name for node in nodes for alias in getattr(node, "names", [])}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = imported | {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert {node.id for node in names} <= known
    statements = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert 0 < len(statements) <= FEW_STATEMENTS
    assert any("hf_fpdt" in ast.unparse(node) for node in tree.body)


def test_prose_is_short_and_leaves_figures_to_tables() -> None:
    text = README.read_text(encoding="utf-8")
    check_prose(text)
    assert_rejects(
        check_prose,
        {
            "four numbers": text + "\nIt took 18 min 20 s at 1,089 tokens/s and 47 %.\n",
            "a long sentence": text + "\n" + "word " * 31 + "\n",
            "a long page": text + "\n" * MAX_LINES,
        },
    )
    check_prose("Llama-3.1-8B on an H100 80GB under FSDP2 at `1 2 3 4 5`: [see](a1.md#1-2-3).\n\n| 1 | 2 | 3 | 4 |\n")


def test_python_comes_early_and_is_complete() -> None:
    text = README.read_text(encoding="utf-8")
    check_first_python(text)
    assert_rejects(
        check_first_python,
        {
            "a missing import": re.sub(r"^from peft .*\n", "", text, flags=re.MULTILINE),
            "late": "\n" * EARLY_LINES + text,
            "nothing of ours": text.replace("hf_fpdt import FPDTTrainer", "elsewhere import FPDTTrainer", 1),
        },
    )


def test_python_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with a tiny model for the one of the hub, a length it has, and one epoch of two short books."""
    import datasets
    import torch

    write_tiny_checkpoint(tmp_path / "Qwen/Qwen3-4B-Instruct-2507")
    (tmp_path / "books").mkdir()
    for number, text in enumerate(stories(2)):
        (tmp_path / f"books/{number}.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code = next(found[2] for found in BLOCK.finditer(README.read_text(encoding="utf-8")) if found[1] == "python")
    code = code.replace("262_144", "256").replace("bf16=True", 'use_cpu=True, report_to="none", max_steps=2')
    code, last, _ = code.rpartition(".train()")
    names: dict[str, Any] = {}
    exec(code.replace("FPDTTrainer(model", "trainer = FPDTTrainer(model"), names)
    assert last and names["trainer"].train().global_step == 2
    assert hasattr(names["trainer"], "fpdt_handle") and torch.isfinite(
        torch.tensor(names["trainer"].state.log_history[-1]["train_loss"])
    )


def test_the_two_commands_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert re.search(rf"^{re.escape(command)}\b", text, re.MULTILINE), command
