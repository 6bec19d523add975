"""One training step of a model with random weights, recorded by torch.profiler together with its conditions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ...attention import AttentionSpec, select_kernel
from ...config import FPDTPlugin, resolve_chunk_tokens
from ...model import LORA_RANK, apply_fpdt, build_random
from ...parallel import SequenceParallelGroup, ShardingCollator, build_group
from ...plan import attention_sizes
from ..conditions import commit, versions_of
from .trace_file import metadata

DEVICE, DTYPE = "cuda", torch.bfloat16
PACKAGES = ("hf_fpdt", "torch", "transformers", "peft", "flash-attn-4")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is to be recorded.

    Attributes:
        name: the model, for people.
        config: its sizes.
        n_tokens: length of the one sequence.
        lora: train adapters alone, not every weight.
        plugin: FPDT's settings.
    """

    name: str
    config: Any
    n_tokens: int
    lora: bool
    plugin: FPDTPlugin

    def kernel_name(self) -> str:
        """The attention kernel that will serve.

        Raises:
            NotImplementedError: none does; every reason is named.
            LayersDiffer: the model's layers have heads of different sizes.
        """
        head_dim = attention_sizes(self.config.get_text_config()).head_dim
        return select_kernel(self.plugin.kernel, torch.device(DEVICE), DTYPE, AttentionSpec.plain(head_dim)).name

    def about(self) -> dict[str, str]:
        """Title and conditions, for the file and the picture."""
        plugin = self.plugin
        training = f"LoRA r={LORA_RANK}" if self.lora else "every weight trained"
        conditions = [
            f"{plugin.sp_size} x {torch.cuda.get_device_name()}",
            f"{self.config.get_text_config().num_hidden_layers} layers, random weights, {training}, bfloat16",
            f"sp_size {plugin.sp_size}, 1 x {self.n_tokens:,} tokens, chunk_tokens {plugin.chunk_tokens}, "
            f"checkpoints {plugin.checkpoints}",
            f"device_budget_gib {plugin.device_budget_gib}, kernel {self.kernel_name()}",
            versions_of(PACKAGES),
            f"python {platform.python_version()}, commit {commit()}, {date.today()}",
        ]
        title = f"One decoder layer of {self.name}, {self.n_tokens:,} tokens"
        return {"title": title, "conditions": "; ".join(conditions)}


def record_step(recording: Recording, path: Path) -> None:
    """Build the model, run one step to warm up, record the next, and write its trace to `path` (.json or .json.gz).

    With `sp_size` above 1 every rank of the group must call it; the first one records.

    Raises:
        NotImplementedError: the model, a setting or the kernel is not supported.
        torch.OutOfMemoryError: the step does not fit on the device.
    """
    about, group = recording.about(), build_group(recording.plugin.sp_size)
    torch.manual_seed(0)
    model = build_random(recording.config, DEVICE, DTYPE, recording.lora)
    apply_fpdt(model, recording.plugin, group)
    batch = _batch(recording, group)
    _step(model, batch)
    if group.rank:
        _step(model, batch)
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _step(model, batch)
        profiler.add_metadata_json(*metadata(**about))
    profiler.export_chrome_trace(str(path))


def _batch(recording: Recording, group: SequenceParallelGroup) -> dict[str, Tensor]:
    """Random ids, the same on all ranks, and of them what is this rank's."""
    vocabulary = recording.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, recording.n_tokens), generator=torch.Generator().manual_seed(0))
    chunk_tokens = resolve_chunk_tokens(recording.plugin, on_gpu=True)
    cut = ShardingCollator(
        lambda rows: {"input_ids": rows[0], "labels": rows[0]}, group.size, group.rank, chunk_tokens
    )
    return {name: value.to(DEVICE) for name, value in cut([ids]).items()}


def _step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    model.zero_grad()
    torch.cuda.synchronize()
