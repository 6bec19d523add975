"""Rates in a file: what is written is read, and a file that is not one of ours is refused by what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_fpdt.forecast.rates import GPUS
from hf_fpdt.forecast.rates_file import read_rates, save_rates


@pytest.mark.parametrize("name", GPUS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    save_rates(GPUS[name], tmp_path / "gpu.json")
    read = read_rates(tmp_path / "gpu.json")
    assert read == GPUS[name] and dict(read.attention) == dict(GPUS[name].attention)


def test_a_file_without_the_wider_heads_is_read_and_they_are_reckoned(tmp_path: Path) -> None:
    """As versions before them wrote it, and as `check --measure` does."""
    path, known = tmp_path / "gpu.json", GPUS["h100"]
    slower = {width: (forward / 2, backward / 4) for width, (forward, backward) in known.attention.items()}
    save_rates(replace(known, attention={width: slower[width] for width in (64, 128)}), path)
    assert set(json.loads(path.read_text())["attention"]) == {"64", "128"}
    read = read_rates(path)
    assert set(read.attention) == {64, 128}
    for head_dim, value_dim, width in ((256, 256, 256), (192, 128, (192, 128)), (64, 64, 64)):
        assert read.attention_rates(head_dim, value_dim) == pytest.approx(slower[width])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hf_fpdt_rates": None}, "no rates in it.*check --measure --rates"),
        ({"matmul": -1}, "'matmul' is -1, a number above zero"),
        ({"link": None}, "'link' is None"),
        ({"peers": None}, "'peers' is None"),
        ({"peak": True}, "'peak' is True"),
        ({"memory": float("inf")}, "'memory' is inf"),
        ({"name": 3}, "'name' is 3, a text"),
        ({"attention": {"64": [1, 2]}}, "head dimension 128 is None"),
        ({"attention": {"64": [1, "x"], "128": [1, 2]}}, "'attention' is 'x'"),
        ({"attention": {"64": [1, 2], "128": [1, 2], "256": 3}}, "head dimension 256 is 3"),
        ({"attention": {"64": [1, 2], "128": [1, 2], "192x128": [0, 1]}}, "'attention' is 0"),
    ],
)
def test_a_file_that_is_not_one_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    save_rates(GPUS["h100"], path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        read_rates(path)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b"[1, 2]"])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="gpu.json.*is expected"):
        read_rates(path)
