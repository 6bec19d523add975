"""What the command line of `hf-fpdt eval` offers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..finetune.options import WHAT_IS_READ, option
from ..options import UserMistake


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is measured, and on what."""

    model: str = option(
        ...,
        "hub name or folder of a model, or of an adapter, whose config.json then sets the rotary parameters",
        metavar="NAME",
    )
    base_model: str | None = option(None, "of the adapter, where it has moved since", metavar="NAME")
    data: list[str] = option(..., f"held-out documents: {WHAT_IS_READ}", metavar="PATH")
    text_column: str = option("text", "the column of a table that holds a document's text", metavar="NAME")
    broken_lines: Literal["skip", "error"] = option("skip", "lines of a table that can't be read: leave out, or stop")
    max_length: int = option(8 * 1024, "tokens of a window: 8192, 32K (1,024 each), 1M", metavar="TOKENS")
    eval_windows: int = option(16, "at most so many", metavar="N")
    chunk_tokens: str = option("auto", "tokens of a chunk of FPDT: auto, or a number like 32K", metavar="TOKENS")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the weights; auto: bfloat16 on a GPU, as hf-fpdt finetune has it, float32 on a CPU"
    )
    quantize: Literal["none", "nf4", "int8"] = option(
        "none", "hold the model, or the adapter's base, in 4 or 8 bits, as it was trained; bitsandbytes"
    )
    use_cpu: bool = option(False, "measure on the CPU though there is a GPU")
    output_dir: Path = option(..., "folder for the figure and the csv", metavar="FOLDER")

    @property
    def adapter(self) -> str | None:
        """The model, where it is an adapter."""
        return self.model if (Path(self.model) / "adapter_config.json").is_file() else None

    @property
    def base(self) -> str:
        """The model, or what the adapter was made for."""
        return self.base_model or (_base_of(self.adapter) if self.adapter else self.model)


def _base_of(adapter: str) -> str:
    path = Path(adapter) / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserMistake(f"--model: {path} names no base model; give it with --base_model") from error
    return str(base)
