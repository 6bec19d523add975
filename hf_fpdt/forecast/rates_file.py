"""Rates of a machine's own GPU in a JSON file: `hf-fpdt check --rates` writes it, `hf-fpdt plan --rates` reads it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .rates import GPU, LATENT, WIDTHS, Width

FORMAT = 1
# What `check --measure` measures, and what must be there; other widths may be.
HEAD_DIMS = (64, 128)
_NAMES = MappingProxyType({"x".join(map(str, w)) if isinstance(w, tuple) else str(w): w for w in (*WIDTHS, LATENT)})
_TEXTS, _ATTENTION = ("name", "source"), "attention"


def save_rates(gpu: GPU, path: Path) -> None:
    """Write a GPU's rates: operations or bytes a second, and memory in GiB."""
    content: dict[str, Any] = {"hf_fpdt_rates": FORMAT}
    content |= {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    content[_ATTENTION] = {name: list(gpu.attention[w]) for name, w in _NAMES.items() if w in gpu.attention}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_rates(path: Path) -> GPU:
    """What `save_rates` wrote.

    Raises:
        ValueError: the file is none of its own, or a rate is no number above zero.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); {_EXPECTED}") from None
    if not isinstance(content, dict) or content.get("hf_fpdt_rates") != FORMAT:
        raise ValueError(f"{path} has no rates in it; {_EXPECTED}")
    values = {field.name: _value(field.name, content.get(field.name), path) for field in fields(GPU)}
    return GPU(**values)


_EXPECTED = "a file that `hf-fpdt check --measure --rates FILE` wrote is expected."


def _value(name: str, value: Any, path: Path) -> Any:
    if name in _TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name!r} is {value!r}, a text is expected.")
        return value
    if name != _ATTENTION:
        return _rate(name, value, path)
    rates = value if isinstance(value, dict) else {}
    read: dict[Width, tuple[float, float]] = {}
    for title, width in _NAMES.items():
        pair = rates.get(title)
        if pair is None and width not in HEAD_DIMS:
            continue
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{path}: 'attention' of head dimension {title} is {pair!r}; [forward, backward] is expected."
            )
        read[width] = (_rate(name, pair[0], path), _rate(name, pair[1], path))
    return MappingProxyType(read)


def _rate(name: str, value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{path}: {name!r} is {value!r}, a number above zero is expected.")
    return float(value)
