"""The model to train: what can be known of it before a weight is read or a text tokenised, and then its weights."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    find_adapter_config_file,
)

from ...config import FPDTPlugin
from ...model import apply_fpdt
from ...parallel import SequenceParallelGroup
from ..options import UserMistake, check_folder, no_folder_either, one_line, plain

# In transformers' own order: the first that is there is loaded.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
CANNOT_BE_LOADED = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
# What sizes that do not fit together raise, such as a padding token beyond the vocabulary.
CANNOT_BE_BUILT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
# What a broken config.json or tokenizer.json raises, of what it holds in place of what is expected.
CANNOT_BE_READ = (*CANNOT_BE_BUILT, ImportError, OSError, StrictDataclassError, ValueError)
NO_MORE: Mapping[str, Any] = MappingProxyType({})
FETCH_AGAIN = "copy or download the weights again (a clone without git-lfs has none)"


def load_config_and_tokenizer(name: str) -> tuple[PreTrainedConfig, Any]:
    """The small files of the model; a wrong name is found here, before any weight is read."""
    check_folder(name)
    _refuse_adapter(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except CANNOT_BE_READ as error:
        raise _unreadable("config", name, error) from error
    tokenizer = _load_tokenizer(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except CANNOT_BE_READ as error:
        raise _unreadable("tokenizer", name, error) from error
    except Exception as error:
        # The tokenizers library raises the class Exception itself, which has no narrower name to catch it by.
        if type(error) is not Exception:
            raise
        raise _unreadable("tokenizer", name, error) from error


def _unreadable(what: str, name: str, error: BaseException) -> UserMistake:
    return UserMistake(
        f"--model: the {what} of {name!r} can't be read: {one_line(error)}{no_folder_either(name)}; give a hub "
        "name or the whole folder of a model with its tokenizer, and check the name, or the network"
    )


def _refuse_adapter(name: str) -> None:
    """An adapter's folder loads as its base with the adapter in it, and would be trained around a second time."""
    try:
        path = find_adapter_config_file(name)
        base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path") if path else None
    except (OSError, ValueError, AttributeError):  # no such model, or a broken file: another check says which
        return
    if path:
        raise UserMistake(
            f"--model: {name!r} is a PEFT adapter (it has an adapter_config.json), not a model; give its base model"
            f"{f', {base!r}' if base else ''}, or merge it first: merge_and_unload(), then save_pretrained()"
        )


def check_weights(name: str, config: PreTrainedConfig) -> None:
    """Refuse a folder whose weights are not there or not whole, from the heads of the files."""
    folder = Path(name)
    if not folder.is_dir() or getattr(config, "transformers_weights", None):
        return  # a hub name: its weights come with from_pretrained; or a file of a name of its own
    first = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if first is None:
        raise UserMistake(
            f"--model: the folder {folder} holds no weights, none of {', '.join(WEIGHT_FILES)}; give a folder that "
            "save_pretrained wrote, or a hub name"
        )
    for path in _shards(first):
        try:
            _check_head(path)
        except (OSError, SafetensorError, EOFError) as error:
            raise UserMistake(f"--model: {path} can't be read: {one_line(error)}; {FETCH_AGAIN}") from error


def _shards(path: Path) -> list[Path]:
    """The files that an index names; or the one file."""
    if not path.name.endswith(".json"):
        return [path]
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserMistake(f"--model: {path} is no index of weights: {one_line(error)}; {FETCH_AGAIN}") from error
    return [path.with_name(str(file)) for file in sorted(files)]


def _check_head(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):  # compares its table of contents with the length of the file
            return
    with path.open("rb") as file:
        head = file.read(1)
    if head != b"\x80" and not zipfile.is_zipfile(path):
        raise EOFError("neither a zip archive nor a pickle, as torch.save writes them, or cut off")


@contextmanager
def applying(name: str) -> Iterator[None]:
    """Inside FPDT is applied to a model, with weights or without; a refusal says which model that is."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        raise UserMistake(f"--model: hf_fpdt can't train {name}: {plain(error)}") from error


def model_without_weights(
    name: str, config: PreTrainedConfig, plugin: FPDTPlugin, group: SequenceParallelGroup | None = None
) -> nn.Module:
    """The model on no device, under FPDT; refuses what FPDT can't run."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserMistake(f"--model: {name} is no causal language model ({type(config).__name__}); give one that is")
    try:
        with applying(name):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="fpdt")
            apply_fpdt(model, plugin, group)
    except CANNOT_BE_BUILT as error:
        raise UserMistake(
            f"--model: the config of {name!r} makes no model: {one_line(error)}; give the config that belongs to it"
        ) from error
    return model


def check_lora_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Refuse names that match no layer; "all-linear" always does."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in targets if target not in names] if isinstance(targets, list) else []
    if missing:
        raise UserMistake(
            f"--lora_target_modules: {', '.join(missing)} is in no layer of this model; allowed: all-linear or any of "
            f"{', '.join(sorted(names))}"
        )


def known_ids(model: PreTrainedModel) -> int:
    """How many token ids the model knows: from this number on they have no embedding, or no logit."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(end.weight.shape[0] for end in ends if end is not None)


def load_weights(
    name: str, dtype: torch.dtype, config: PreTrainedConfig | None = None, how: Mapping[str, Any] = NO_MORE
) -> nn.Module:
    """The model; refuses weights that are broken, or of another model than its config says.

    Args:
        name: hub name or folder.
        dtype: of the weights, but for those that are quantised.
        config: in place of its own.
        how: what else `from_pretrained` is told, see `quantise.loading`; the model is on the CPU unless this says.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=config, attn_implementation="fpdt", dtype=dtype, output_loading_info=True, **how
        )
    except CANNOT_BE_LOADED as error:
        raise UserMistake(
            f"--model: the weights of {name!r} can't be loaded: {one_line(error)}; give weights that are whole and "
            "belong to the config beside them"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserMistake(
            f"--model: the weights of {name!r} lack {len(missing)} parameter(s) of the model, the first {missing[0]}, "
            "which would start from random numbers; give weights that belong to the config beside them"
        )
    return model
