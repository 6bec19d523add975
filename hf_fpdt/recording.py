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

from .config import FPDTPlugin
from .kernels import select_kernel
from .model import apply_fpdt
from .shapes import LORA_RANK, build_random
from .trace_file import metadata
from .versions import commit, versions_of

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
        """
        text = self.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return select_kernel(self.plugin.kernel, torch.device(DEVICE), DTYPE, head_dim).name

    def about(self) -> dict[str, str]:
        """Title and conditions, for the file and the picture."""
        plugin = self.plugin
        training = f"LoRA r={LORA_RANK}" if self.lora else "every weight trained"
        conditions = [
            torch.cuda.get_device_name(),
            f"{self.config.get_text_config().num_hidden_layers} layers, random weights, {training}, bfloat16",
            f"1 x {self.n_tokens:,} tokens, chunk_tokens {plugin.chunk_tokens}, checkpoints {plugin.checkpoints}",
            f"device_budget_gib {plugin.device_budget_gib}, kernel {self.kernel_name()}",
            versions_of(PACKAGES),
            f"python {platform.python_version()}, commit {commit()}, {date.today()}",
        ]
        title = f"One decoder layer of {self.name}, {self.n_tokens:,} tokens"
        return {"title": title, "conditions": "; ".join(conditions)}


def record_step(recording: Recording, path: Path) -> None:
    """Build the model, run one step to warm up, record the next, and write its trace to `path` (.json or .json.gz).

    Raises:
        NotImplementedError: the model, a setting or the kernel is not supported.
        torch.OutOfMemoryError: the step does not fit on the device.
    """
    about = recording.about()
    model = build_random(recording.config, DEVICE, DTYPE, recording.lora)
    apply_fpdt(model, recording.plugin)
    vocabulary = recording.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, recording.n_tokens), device=DEVICE)
    _step(model, ids)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _step(model, ids)
        profiler.add_metadata_json(*metadata(**about))
    profiler.export_chrome_trace(str(path))


def _step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    torch.cuda.synchronize()
