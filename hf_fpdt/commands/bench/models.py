"""The models that a job names: a configuration, random weights of it, and random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ...labels import IGNORE_INDEX
from ...model import SHAPES, build_random, with_layers
from ...parallel import positions_of
from ..options import corpus_of
from .job import Job

SEED = 0


def config_of(job: Job, most_layers: int | None = None) -> Any:
    """The job's configuration, with at most so many layers."""
    config: Any = SHAPES[job.shape]() if job.model is None else AutoConfig.from_pretrained(job.model)
    layers = job.layers or config.get_text_config().num_hidden_layers
    return with_layers(config, layers if most_layers is None else min(layers, most_layers))


def model_of(job: Job, config: Any) -> nn.Module:
    """Random weights, the same for every stack; LoRA of rank 16 on every linear, or every weight trained."""
    torch.manual_seed(SEED)
    return build_random(config, job.device, getattr(torch, job.dtype), not job.full, job.quantised)


def packed_row(job: Job, ids_BS: Tensor) -> dict[str, Tensor]:
    """What tells the documents of a row apart; nothing where it is one."""
    if job.documents is None:
        return {}
    return {"position_ids": positions_of(corpus_of(job.documents).row(ids_BS.shape[1]), ids_BS.device)[None]}


def without_first_tokens(labels_BS: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
    """Labels of which none is that of a document's first token."""
    return labels_BS.masked_fill(packed["position_ids"] == 0, IGNORE_INDEX) if packed else labels_BS


def tokens_of(job: Job, config: Any, n_tokens: int, step: int = 0) -> Tensor:
    """Random ids [1, S], the same for every stack."""
    generator = torch.Generator(job.device).manual_seed(SEED + step)
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (1, n_tokens), device=job.device, generator=generator)
