"""scripts/docs/families.py: exact, refused and wrong families are told apart, and stand in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from hf_fpdt.attention import AttentionSpec
from hf_fpdt.attention.kernels import table as kernels
from tests.helpers import app_support  # noqa: F401  puts scripts/docs on the path

import families  # isort: skip
from family_trial import EXACT, LATE, NOT_TRIED, REFUSED, WRONG, Verdict, tried  # isort: skip

VERDICTS = [
    Verdict("llama", "Llama", EXACT, error=1.2e-7, how="float64"),
    Verdict("beam", "Beam", REFUSED, ("an argument of shape (1, 48) | is not cut",)),
    Verdict("moshi", "Moshi", REFUSED, ("an argument of shape (2, 3) | is not cut",)),
    Verdict("gone", "Gone", NOT_TRIED, ("its process ended with -9",)),
]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_exact_family_and_one_with_a_window(family: str) -> None:
    found = tried(family, f"{family.title()}ForCausalLM")
    assert found.verdict == EXACT and found.how == "float64" and 0 < (found.error or 0) < 1e-9, found


def test_a_refused_family_says_why() -> None:
    found = tried("diffllama", "DiffLlamaForCausalLM")
    assert found.verdict == REFUSED and "calls its attention function twice" in found.reasons[0], found


def test_a_window_that_is_not_the_mask_s_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is longer than the window."""
    monkeypatch.setattr(
        "hf_fpdt.model.layers.window_of_mask", lambda mask: None if mask is None else mask.fpdt_window + 1
    )
    monkeypatch.setattr("hf_fpdt.model.attention_function._agreed_window", lambda _, masked, *__: masked)
    assert tried("mistral", "MistralForCausalLM").verdict == WRONG


@pytest.mark.parametrize("factor", [1 + 1e-4, 1.05])
def test_a_family_that_is_trained_wrong_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.KERNELS["cpu"]

    def forward(*args: Any, spec: AttentionSpec, **kwargs: Any) -> Any:
        return right.forward(*args, spec=replace(spec, scale=factor * spec.scale), **kwargs)

    table = {**kernels.KERNELS, "cpu": replace(right, forward=forward)}
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "KERNELS", MappingProxyType(table))
        kernels._select.cache_clear()
        found = tried("llama", "LlamaForCausalLM")
    kernels._select.cache_clear()
    assert found.verdict == WRONG and "relative error" in found.reasons[0], found


def test_what_cannot_be_tried_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise LookupError("no such layer")

    monkeypatch.setattr("family_trial.tiny_config", fails)
    monkeypatch.setattr("family_trial._default", fails)
    assert tried("llama", "Llama").reasons == ("no tiny model of it can be made (LookupError: no such layer)",)


@pytest.mark.parametrize(("last", "status"), [(EXACT, 0), (LATE, 0), (WRONG, 1)])
def test_the_command_writes_both_files_and_ends_with_1_for_a_wrong_one(
    last: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [*VERDICTS, Verdict("other", "Other", last, ("by much",), error=0.5)]
    monkeypatch.setattr(families, "_all_tried", lambda *_: iter(verdicts))
    table, rows = tmp_path / "families.md", tmp_path / "families.json"
    assert families.main(["--write", str(table), "--json", str(rows)]) == status
    assert len(json.loads(rows.read_text())["families"]) == 5
    text = table.read_text()
    assert "| `llama` | `Llama` | 1e-07 |" in text and families.COMMAND in text
    assert "| an argument \\| is not cut | `beam`, `moshi` |" in text
    assert "| its process ended with -9 | `gone` |" in text and (f"## {WRONG} (1)" in text) == (status == 1)


def test_a_family_that_transformers_has_not_is_a_mistake() -> None:
    with pytest.raises(SystemExit, match="no causal llama9"):
        families.main(["--only", "llama,llama9"])
