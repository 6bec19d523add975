"""One family of models, tried: a tiny model of its default configuration trains a step plainly and with FPDT.

The step has 53 tokens in chunks of 8, so that the last chunk is ragged and windows (40 at most) are shorter than the
sequence, and weights that give attention peaks. Loss and every gradient are compared, in float64 where the model runs
in it.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.check.tiny_config import VOCABULARY, shrunk
from hf_fpdt.commands.float64 import float64_throughout
from hf_fpdt.model.apply import why_refused
from hf_fpdt.model.refusals import ATTENTION_DROPOUTS
from hf_fpdt.plan.by_layer import by_layer

TOKENS, CHUNK, LOSS_CHUNK = 53, 8, 6
MOST_PARAMETERS = 100_000_000
# In float64 throughout.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 2e-5}
# No gradient is measured against less than this share of the largest one: the bias of a key projection is rounding.
FLOOR = 1e-3
SECONDS = 60
WEIGHT_GAIN = 2.0

EXACT, REFUSED, LATE, NOT_TRIED = "exact", "refused", "refused at the first step", "not tried"
WRONG, ERROR = "WRONG", "error in a step"
VERDICTS = (EXACT, REFUSED, LATE, NOT_TRIED, WRONG, ERROR)

_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
_BOTH_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
}
_CONVOLVED = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 16}
# Defaults with which transformers makes no model, no tiny one, or one without what every checkpoint has.
TWEAKS: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": _BOTH_ROPES,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2},
        "d_model": 128,
        "n_heads": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _EXPERTS,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": _CONVOLVED,
    "lfm2_moe": _CONVOLVED,
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "hidden_size": 64, "ext_pw_out_channel": 64, "intermediate_size": 64}
    },
    "qwen4_exp": {"text_config": {**_INDEXER, "indexer_compress_ratio": 4}},
    "qwen4_exp_text": {**_INDEXER, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds": False},
}


@dataclass(frozen=True)
class Verdict:
    """What became of one family.

    Attributes:
        family: transformers' model type.
        architecture: the class.
        verdict: one of VERDICTS.
        reason: why it is not exact; every reason for a refused one, the first of them first.
        error: the worst relative error of loss and gradients.
        how: in which dtype they were compared.
        settings: what was changed in the default configuration for FPDT to have it.
    """

    family: str
    architecture: str
    verdict: str
    reasons: tuple[str, ...] = ()
    error: float | None = None
    how: str = ""
    settings: str = ""


class TooLong(BaseException):
    """A model took more than its time; no handler of an error of the model's is to take it for one."""


class NotComparable(Exception):
    """There is no plain step to compare with."""


def tried(family: str, architecture: str) -> Verdict:
    """What FPDT does with a family; whatever a model raises becomes a verdict."""
    verdict = Verdict(family, architecture, NOT_TRIED)
    try:
        with _limited(SECONDS), float64_throughout():
            return _tried(verdict)
    except TooLong:
        return replace(verdict, reasons=(f"takes more than {SECONDS} seconds",))


def _tried(verdict: Verdict) -> Verdict:
    try:
        config = tiny_config(verdict.family)
        refused = why_refused(_built(verdict.family, config, "meta"))
    except Exception as error:
        return _without_tiny(verdict, _said(error))
    verdict = replace(verdict, settings=_settings(verdict.family, config))
    if refused:
        return replace(verdict, verdict=REFUSED, reasons=tuple(refused))
    return _compared(verdict, config)


def _without_tiny(verdict: Verdict, why: str) -> Verdict:
    """From the default sizes, for a model without memory for its weights can be asked too."""
    try:
        refused = why_refused(_built(verdict.family, _default(verdict.family), "meta", most=None))
    except Exception:
        refused = []
    if refused:
        return replace(verdict, verdict=REFUSED, reasons=tuple(refused))
    return replace(verdict, reasons=(f"no tiny model of it can be made ({why})",))


def _compared(verdict: Verdict, config: Any) -> Verdict:
    reason = ""
    for dtype in TOLERANCES:
        try:
            return _compared_in(verdict, config, dtype)
        except NotComparable as error:
            reason = reason or str(error)
    return replace(verdict, reasons=(f"does not run by itself ({reason})",))


def _compared_in(verdict: Verdict, config: Any, dtype: torch.dtype) -> Verdict:
    model = _built(verdict.family, config, "cpu").to(dtype)
    _make_plain(model, dtype)
    _draw(model)
    truth = _plain_step(model, TOLERANCES[dtype])
    mode = "" if model.training else ", in evaluation mode, for its training draws random numbers"
    verdict = replace(verdict, how=f"{str(dtype).removeprefix('torch.')}{mode}")
    if reasons := why_refused(model):
        return replace(verdict, verdict=REFUSED, reasons=tuple(reasons))
    try:
        apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=LOSS_CHUNK, progress=False))
    except Exception as error:
        late = REFUSED if isinstance(error, NotImplementedError) else ERROR
        return replace(verdict, verdict=late, reasons=(_said(error),))
    try:
        ours = _step(model)
    except Exception as error:
        late = LATE if isinstance(error, (NotImplementedError, RuntimeError)) else ERROR
        return replace(verdict, verdict=late, reasons=(_said(error),))
    name, worst = worst_error(ours, truth)
    if worst <= TOLERANCES[dtype]:
        return replace(verdict, verdict=EXACT, error=worst)
    return replace(verdict, verdict=WRONG, error=worst, reasons=(f"relative error {worst:.1e} in {name}",))


# -- the model --------------------------------------------------------------------------------------------------------


def tiny_config(family: str) -> Any:
    """The default configuration with small sizes, in its parts too."""
    config = _default(family)
    _shrink_parts(config)
    return _small(config)


def _default(family: str) -> Any:
    """Of the class: some classes are a part of what their model type configures."""
    config = AutoConfig.for_model(family, **copy.deepcopy(dict(TWEAKS.get(family, {}))))
    parts = [getattr(config, name, None) for name in config.sub_configs]
    wanted = _class_of(family).config_class
    config = next((part for part in (config, *parts) if isinstance(part, wanted)), config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _class_of(family: str) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def _shrink_parts(config: Any) -> None:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            _shrink_parts(part)
            setattr(config, name, _small(part))


def _small(config: Any) -> Any:
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    known = all(None not in by_layer(config, name) for name in needed)
    return shrunk(config) if known else config


def _settings(family: str, config: Any) -> str:
    """What is not as in the default configuration; and a window that its layers do not have."""
    text = config.get_text_config()
    tweaks = TWEAKS.get(family, {}).items()
    notes = [f"its own {name}" if isinstance(value, dict) else f"{name}={value!r}" for name, value in tweaks]
    default = _default(family).get_text_config()
    notes += [f"{name}=0.0" for name in ATTENTION_DROPOUTS if any(by_layer(default, name))]
    kinds = getattr(text, "layer_types", None) or ()
    if any(by_layer(text, "sliding_window")) and kinds and "sliding_attention" not in kinds:
        notes.append("no layer has the window that it may have")
    return ", ".join(notes)


def _built(family: str, config: Any, device: str, most: int | None = MOST_PARAMETERS) -> Any:
    if device != "meta":
        _built(family, config, "meta", most)
    with torch.device(device):
        model = _class_of(family)._from_config(copy.deepcopy(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    if most is not None and count > most:
        raise ValueError(f"it would have {count:,} parameters")
    return model.train()


def _make_plain(model: Any, dtype: torch.dtype) -> None:
    """SDPA's attention, for the eager one has its softmax in fp32; and experts in a way that has float64."""
    for name in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(name)
            break
        except ValueError:
            continue
    if dtype == torch.float64 and model.config._experts_implementation not in (None, "eager"):
        model.set_experts_implementation("eager")


def _draw(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * WEIGHT_GAIN / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


# -- a step -----------------------------------------------------------------------------------------------------------


def _plain_step(model: Any, tolerance: float) -> dict[str, Tensor]:
    """Without FPDT; in evaluation mode where the one for training draws random numbers, and so it stays."""
    for train in (True, False):
        model.train(train)
        try:
            truth, again = _step(model), _step(model)
        except Exception as error:
            raise NotComparable(_said(error)) from error
        if not all(value.isfinite().all() for value in truth.values()):
            raise NotComparable("its loss or gradients are not finite")
        if worst_error(again, truth)[1] <= tolerance:
            return truth
    raise NotComparable("its step is never the same")


def _step(model: Any) -> dict[str, Tensor]:
    """Loss and gradients by name; the model has none afterwards."""
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return {"loss": loss.detach(), **found}


def worst_error(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[str, float]:
    """The tensor that is furthest off, and its relative error; infinite where only one of two has a gradient."""
    if ours.keys() != truth.keys():
        return min(ours.keys() ^ truth.keys()), float("inf")
    sizes = {name: float(value.abs().max()) for name, value in truth.items()}
    floor = FLOOR * max((size for name, size in sizes.items() if name != "loss"), default=0.0)
    errors = {
        name: float((ours[name].double() - value.double()).abs().max()) / max(sizes[name], floor, 1e-300)
        for name, value in truth.items()
    }
    # A NaN is worse than any number.
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return worst, float("inf") if errors[worst] != errors[worst] else errors[worst]


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
