"""A PEFT adapter's folder in place of a model: its base, and whether the two belong together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...model import rope_of, trained_rope
from ..options import ADAPTER_CONFIG, UserMistake, one_line, read_config

# What PEFT raises of a configuration that it, or this model, does not know.
BROKEN_ADAPTER = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
# Settings of an adapter that say how it is begun or where it acts: a copy of few layers has none of these places, and
# what is drawn in training would differ from step to step.
PLAIN_SETTINGS = (("layers_to_transform", None), ("lora_dropout", 0.0), ("init_lora_weights", True))


@dataclass(frozen=True)
class Adapter:
    """An adapter and the configurations of what it is put on.

    Attributes:
        folder: where it lies.
        peft: its own configuration.
        base: hub name or folder of its base.
        base_config: of the base as it is.
        config: of the base as it was when the adapter was trained, as far as the folder tells.
    """

    folder: Path
    peft: Any
    base: str
    base_config: PreTrainedConfig
    config: PreTrainedConfig

    def put_on(self, model: PreTrainedModel, *, tiny: bool = False) -> PeftModel:
        """An untrained adapter of the same kind around a model; without memory where the model has none.

        Args:
            tiny: the model is a small copy, and what is computed is to be repeatable.

        Raises:
            UserMistake: PEFT cannot put it there.
        """
        config = copy.deepcopy(self.peft)
        config.inference_mode = False
        for name, value in PLAIN_SETTINGS if tiny else PLAIN_SETTINGS[-1:]:
            if hasattr(config, name):
                setattr(config, name, value)
        if tiny:
            config.auto_mapping = None
        config.base_model_name_or_path = model.name_or_path  # PEFT would say that it has been renamed
        no_memory = any(parameter.is_meta for parameter in model.parameters())
        try:
            with warnings.catch_warnings():
                # It still asks by the old name of a property, and names of layers are not all in a small copy.
                warnings.simplefilter("ignore")
                return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=no_memory)
        except BROKEN_ADAPTER as error:
            raise UserMistake(
                f"{self.folder}: PEFT can't put this adapter on a model of its base, {self.base}: {one_line(error)}; "
                "give the adapter's own base with --base-model"
            ) from error

    def lines(self) -> Sequence[str]:
        """What it is, and whether it was trained with the rotary parameters that its base has."""
        rank = getattr(self.peft, "r", None)
        rank = f" of rank {rank}" if isinstance(rank, int) else ""
        kind = str(getattr(self.peft.peft_type, "value", self.peft.peft_type))
        said = [f"{self.folder}: {kind}{rank}, on {self.base}"]
        trained, now = trained_rope(self.peft), rope_of(self.base_config)
        if trained is None and not (self.folder / "config.json").is_file():
            said.append(
                "it does not say with which rotary parameters it was trained; the base's own are taken for them"
            )
        elif rope_of(self.config) == now:
            said.append("it was trained with the rotary parameters that its base has")
        else:
            said += self._another_rope(rope_of(self.config), now)
        return said

    def _another_rope(self, trained: Any, now: Any) -> list[str]:
        with_it = f'config=AutoConfig.from_pretrained("{self.folder}")'
        if not (self.folder / "config.json").is_file():
            with_it = "these in config.rope_parameters"
        return [
            f"WARNING: it was trained with other rotary parameters than its base has: {trained}, not {now}. On the "
            f"base as it is its losses are worse, far worse in long texts: load the base with {with_it}"
        ]


def adapter_of(model: str | None, base: str | None) -> Adapter | None:
    """The adapter that `model` is a folder of; None where it is none.

    Args:
        base: in place of the base that the adapter names.

    Raises:
        UserMistake: its configuration cannot be read, or its base is not there.
    """
    folder = Path(model or "")
    if model is None or not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            what = f"{model} has none" if model else "give the adapter's folder"
            raise UserMistake(f"--base-model {base}: it is for a folder with an {ADAPTER_CONFIG}; {what}.")
        return None
    try:
        peft = PeftConfig.from_pretrained(str(folder))
    except BROKEN_ADAPTER as error:
        raise UserMistake(f"{folder / ADAPTER_CONFIG} can't be read: {one_line(error)}.") from error
    name = base or peft.base_model_name_or_path
    if not name:
        raise UserMistake(f"{folder / ADAPTER_CONFIG} names no base model; give it with --base-model.")
    try:
        base_config = read_config(str(name))
    except UserMistake as mistake:
        raise UserMistake(
            f"{folder} is an adapter for the base {name!r}, which can't be read: {mistake} A base that lies elsewhere "
            "is given with --base-model."
        ) from mistake
    return Adapter(folder, peft, str(name), base_config, _trained_config(folder, peft, base_config))


def _trained_config(folder: Path, peft: Any, base_config: PreTrainedConfig) -> PreTrainedConfig:
    if (folder / "config.json").is_file():
        try:
            own: PreTrainedConfig = AutoConfig.from_pretrained(str(folder))
        except BROKEN_ADAPTER as error:
            raise UserMistake(f"{folder / 'config.json'} can't be read: {one_line(error)}.") from error
        return own
    config, trained = copy.deepcopy(base_config), trained_rope(peft)
    if trained is not None:
        config.get_text_config().rope_parameters = trained
    return config
