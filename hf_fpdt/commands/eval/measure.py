"""One measurement of `hf-fpdt eval`: every check that takes no time, then the data, and the weights last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig

from ...model import apply_fpdt
from ..finetune.base_model import (
    applying,
    check_weights,
    known_ids,
    load_config_and_tokenizer,
    load_weights,
    model_without_weights,
)
from ..finetune.options import dtype_of, fpdt_plugin
from ..finetune.output import SETTINGS, make_folder
from ..finetune.quantise import check_quantised, loading
from ..finetune.rope import pretrained_tokens
from ..finetune.sources import read_documents
from ..finetune.steps import Progress, quiet
from ..finetune.windows import WindowDataset, document_tokens, plan_eval_windows, tokenise, window_tokens
from ..options import UserMistake, mistakes, one_line
from ..pictures import PictureError
from .curves import table_lines, write_csv
from .figure import draw
from .loss_by_position import measure
from .options import EvalOptions

RUN = "run.json"
BROKEN_ADAPTER = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, SafetensorError)


def evaluate_model(options: EvalOptions) -> list[str]:
    """The table's lines; writes the csv and the figure."""
    quiet()
    progress = Progress()
    make_folder(options.output_dir)
    if (options.output_dir / RUN).is_file():
        raise UserMistake(
            f"--output_dir: {options.output_dir} holds a run of hf-fpdt finetune, whose own loss by position would be "
            "written over; give another folder"
        )
    windows, model = _windows_and_model(options, progress)
    label = Path(options.model).name
    with mistakes(NotImplementedError):
        curves = [measure(model, windows, label, progress.say)]
    reach = pretrained_tokens(model.config, otherwise=curves[0].losses.shape[1] + 1)
    write_csv(options.output_dir / "loss_by_position.csv", curves)
    try:
        draw(options.output_dir / "loss_by_position.png", curves, reach, f"Loss by position, {label}")
    except PictureError as error:
        progress.say(f"no loss_by_position.png: {error}")
    progress.say(f"wrote the loss by position to {options.output_dir}")
    return table_lines(curves, reach)


def _windows_and_model(options: EvalOptions, progress: Progress) -> tuple[list[dict[str, Tensor]], nn.Module]:
    plugin = fpdt_plugin({"chunk_tokens": options.chunk_tokens, "sp_size": "1"})
    config, tokenizer = load_config_and_tokenizer(options.base)
    config = _adapters_config(options.adapter) if options.adapter else config
    ids = known_ids(model_without_weights(options.base, config, plugin))
    check_weights(options.base, config)
    check_quantised(options.quantize, options.base, config)
    _say_of_another_base(options, progress)
    rows = _windows(options, tokenizer, ids, progress)
    on_gpu = torch.cuda.is_available() and not options.use_cpu
    dtype, device = dtype_of(options.dtype, on_gpu=on_gpu), torch.device("cuda" if on_gpu else "cpu")
    how = loading(options.quantize, config, dtype, device)
    model = load_weights(options.base, dtype, config, how)
    with applying(options.base):
        apply_fpdt(model, plugin)
    model = _with_adapter(model, options.adapter) if options.adapter else model
    return [rows[index] for index in range(len(rows))], model if how else model.to(device)


def _say_of_another_base(options: EvalOptions, progress: Progress) -> None:
    trained = _trained_over(options.adapter) if options.adapter else None
    if trained not in (None, options.quantize):
        progress.say(
            f"{options.model} was trained with --quantize {trained} and is measured with --quantize "
            f"{options.quantize}: losses over another base differ"
        )


def _trained_over(adapter: str) -> str | None:
    """What --quantize was when `hf-fpdt finetune` wrote the adapter; None where that is not known, as of others'."""
    try:
        return str(json.loads((Path(adapter) / SETTINGS).read_text(encoding="utf-8"))["settings"]["quantize"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _windows(options: EvalOptions, tokenizer: Any, ids: int, progress: Progress) -> WindowDataset:
    documents = read_documents(options.data, options.text_column, options.broken_lines, progress.say)
    tokenised = tokenise(documents, tokenizer, "held-out documents", ids)
    windows = plan_eval_windows(document_tokens(tokenised), options.max_length, len(documents), options.eval_windows)
    if window_tokens(windows[0]) < 2:
        raise UserMistake("data: fewer than two tokens in every held-out document; give longer documents")
    return WindowDataset(tokenised, windows)


def _adapters_config(folder: str) -> Any:
    try:
        PeftConfig.from_pretrained(folder)  # so that what is broken is found before weights are read
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserMistake(
            f"--model: the adapter {folder!r} has no readable config: {one_line(error)}; give a folder that hf-fpdt "
            "finetune wrote"
        ) from error


def _with_adapter(model: nn.Module, folder: str) -> nn.Module:
    try:
        return PeftModel.from_pretrained(model, folder)
    except BROKEN_ADAPTER as error:
        raise UserMistake(
            f"--model: the adapter {folder!r} can't be loaded: {one_line(error)}; give a folder that hf-fpdt finetune "
            "wrote"
        ) from error
