"""`--merge`: the adapter in the weights, as a model that is loaded without PEFT and has its own rotary parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from ...model import dequantise, quantised_bytes
from ..options import UserMistake
from .options import Options

MERGED = "merged"


def merged_folder(options: Options) -> Path | None:
    """Where the whole model goes; None where none is asked for."""
    return Path(options.trainer.output_dir) / MERGED if options.merge else None


def check_merge(options: Options, config: PreTrainedConfig) -> None:
    """Refuse before the run what could not be merged after it."""
    if not options.merge:
        return
    if options.full:
        raise UserMistake("--merge: --full trains and writes the whole model already; leave one of them out")
    if options.trainer.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise UserMistake(
            "--merge: under FSDP no process has the whole model; leave it out, and merge afterwards: load as the card "
            "says, then merge_and_unload() and save_pretrained()"
        )
    ends = {"lm_head", "embed_tokens", "embed_out", "embed_in"}
    if config.get_text_config().tie_word_embeddings and ends.intersection(options.targets):
        raise UserMistake(
            "--merge: this model's head and embedding are one tensor, and an adapter of one would change both; "
            "leave both out of --lora_target_modules, or leave --merge out"
        )


def write_merged(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """The adapters go into the weights that they are of; a weight that would not be finite is refused by PEFT."""
    if quantised_bytes(model)[0]:
        model = _over_plain_weights(model, folder.parent, dtype)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _over_plain_weights(model: Any, adapter: Path, dtype: torch.dtype) -> Any:
    """The saved adapter on the dequantised base, on the host: into 4 bits its weights would be rounded away."""
    base = model.unload()
    dequantise(base, dtype, "cpu")
    return PeftModel.from_pretrained(base.to("cpu"), adapter)
