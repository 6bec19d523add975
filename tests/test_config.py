"""FPDTPlugin: what it takes, where it takes it from, and what it says when it does not."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import pytest

from hf_fpdt import FPDTPlugin
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.config import CHECKPOINT_POLICIES, KERNEL_NAMES, parse_tokens

FOLDER = tempfile.gettempdir()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in dataclasses.fields(FPDTPlugin):
        monkeypatch.delenv(f"FPDT_{field.name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8192", 8192), ("32K", 32768), ("32k", 32768), ("1M", 1024**2), ("2m", 2 * 1024**2), ("1.5K", 1536)],
)
def test_a_number_of_tokens_takes_the_suffixes_k_and_m(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "K", "32G", "many", "1.7", "0.3K", "inf", "nan", "infK"])
def test_what_is_no_number_of_tokens_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="8192, 32K, 1M"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sp_size", 0, "whole number from 1"),
        ("sp_size", 2.0, "whole number from 1"),
        ("sp_size", True, "whole number from 1"),
        ("chunk_tokens", -1, "whole number from 1"),
        ("chunk_tokens", "32G", "8192, 32K, 1M"),
        ("loss_chunk_tokens", "Auto", "8192, 32K, 1M"),
        ("sp_size", "two", "whole number from 1"),
        ("loss_chunk_tokens", 0, "whole number from 1"),
        ("loss_chunk_tokens", None, "whole number from 1"),
        ("device_budget_gib", -0.5, "GiB from 0"),
        ("host_budget_gib", float("nan"), "GiB from 0"),
        ("host_budget_gib", "64G", "number of GiB"),
        ("host_budget_gib", float("inf"), "GiB from 0"),
        ("disk_dir", 5, "a folder or None"),
        ("disk_dir", "", "does not exist; a folder"),
        ("disk_dir", "/no/such", "does not exist; a folder"),
        ("disk_dir", __file__, "is no folder; a folder that you may write to is expected. Make it, or name another"),
        ("disk_dir", "/proc/self", "no file can be made there .* may write to"),
        ("fused", "maybe", "True or False"),
        ("progress", 1, "True or False"),
        ("kernel", "fa5", "'cudnn'"),
        ("checkpoints", "all", "'segment'"),
    ],
)
def test_each_field_says_what_it_expects(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as refused:
        FPDTPlugin(**{name: value})
    assert f"{name}={value!r}" in str(refused.value)


def test_a_chunk_must_divide_among_the_ranks() -> None:
    assert FPDTPlugin(sp_size=4, chunk_tokens=12).chunk_tokens == 12
    with pytest.raises(ValueError, match="multiple of 4"):
        FPDTPlugin(sp_size=4, chunk_tokens=10)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("FPDT_SP_SIZE", "4", "sp_size", 4),
        ("FPDT_CHUNK_TOKENS", "32K", "chunk_tokens", 32768),
        ("FPDT_CHUNK_TOKENS", "auto", "chunk_tokens", "auto"),
        ("FPDT_KERNEL", "math", "kernel", "math"),
        ("FPDT_CHECKPOINTS", "input", "checkpoints", "input"),
        ("FPDT_DEVICE_BUDGET_GIB", "1.5", "device_budget_gib", 1.5),
        ("FPDT_HOST_BUDGET_GIB", "auto", "host_budget_gib", "auto"),
        ("FPDT_DISK_DIR", FOLDER, "disk_dir", FOLDER),
        ("FPDT_LOSS_CHUNK_TOKENS", "1K", "loss_chunk_tokens", 1024),
        ("FPDT_PROGRESS", "Yes", "progress", True),
        ("FPDT_PROGRESS", "0", "progress", False),
    ],
)
def test_the_environment_and_code_set_a_field_by_the_same_text(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: Any
) -> None:
    in_code: dict[str, Any] = {name: text}
    plugins = [FPDTPlugin(**in_code)]
    monkeypatch.setenv(variable, text)
    for plugin in (*plugins, FPDTPlugin()):
        assert getattr(plugin, name) == value and type(getattr(plugin, name)) is type(value)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("FPDT_CHUNK_TOKEN", "FPDT_CHUNK_TOKENS"),
        ("FPDT_HOST_BUDGET", "FPDT_HOST_BUDGET_GIB"),
        ("FPDT_SPSIZE", "FPDT_SP_SIZE"),
    ],
)
def test_a_variable_of_no_field_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    monkeypatch.setenv("HF_FPDT_COMMIT", "1234567")  # the project's own, and no setting
    assert FPDTPlugin().sp_size == 1
    monkeypatch.setenv(variable, "4")
    cases: tuple[dict[str, Any], ...] = ({}, {"sp_size": 1})
    for given in cases:
        with pytest.raises(ValueError, match=f"{variable}='4' is no setting of FPDT; {nearest} is the nearest"):
            FPDTPlugin(**given)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(FPDTPlugin)])
def test_every_field_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"FPDT_{name.upper()}", "?")
    with pytest.raises(ValueError, match=f"(?i){name}"):
        FPDTPlugin()


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDT_CHUNK_TOKENS", "32K")
    monkeypatch.setenv("FPDT_PROGRESS", "1")
    plugin = FPDTPlugin(chunk_tokens=64, progress=False)
    assert plugin.chunk_tokens == 64 and plugin.progress is False


def test_the_environment_is_read_when_the_plugin_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = FPDTPlugin()
    monkeypatch.setenv("FPDT_SP_SIZE", "2")
    assert before.sp_size == 1 and FPDTPlugin().sp_size == 2


@pytest.mark.parametrize(
    ("variable", "text"),
    [("FPDT_SP_SIZE", "two"), ("FPDT_CHUNK_TOKENS", "32G"), ("FPDT_CHUNK_TOKENS", "inf"), ("FPDT_PROGRESS", "maybe")],
)
def test_a_variable_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable} cannot be read"):
        FPDTPlugin()


def test_a_value_from_the_environment_is_checked_like_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPDT_SP_SIZE", "0")
    with pytest.raises(ValueError, match="sp_size=0"):
        FPDTPlugin()


def test_a_plugin_is_frozen_and_takes_keywords_only() -> None:
    make: Any = FPDTPlugin
    plugin = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plugin.sp_size = 2
    with pytest.raises((AttributeError, TypeError)):
        plugin.chunk_size = 2
    with pytest.raises(TypeError):
        make(2)


def test_a_plugin_has_at_most_eleven_fields() -> None:
    assert len(dataclasses.fields(FPDTPlugin)) <= 11


def test_the_plugin_and_the_table_name_the_same_kernels() -> None:
    assert set(KERNEL_NAMES) == {"auto", *KERNELS}
    assert "auto" in CHECKPOINT_POLICIES
