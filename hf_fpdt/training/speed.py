"""How fast training goes, for Trainer's logs: tokens a second, strict MFU, memory.

Everything is counted on the host from the shapes of the batches; nothing waits for the device but the log itself,
which Trainer waits for anyway, and the begin and end of an evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import applied_settings, device_peak, mostly_trained
from ..plan import strict_flops
from ..units import GIB


class TrainingSpeed:
    """Counts what one process of a training run does between two logs.

    Args:
        accelerator: accelerate's, which knows the other processes.
        whole_rows: whether ranks that share sequences are each given the whole of them.
    """

    def __init__(self, accelerator: Any, *, whole_rows: bool = False) -> None:
        self._accelerator, self._whole_rows = accelerator, whole_rows
        self._model: nn.Module | None = None
        self._settings: Any = None
        self._full = False
        self._paused = False
        self._began: float | None = None
        self._step = 0
        self._tokens = 0.0
        self._operations = 0.0

    def begin(self, model: nn.Module, step: int) -> None:
        """A batch is about to be trained on; the clock runs from the first one on.

        Args:
            step: optimizer steps that are done.
        """
        if model is not self._model:
            self._model, self._settings = model, applied_settings(model)
            self._full = mostly_trained(list(model.parameters()))
        if self._began is None:
            self._began, self._step = time.perf_counter(), step
        if self._settings is not None:
            self._settings.packed = None

    def count(self, inputs: Any) -> None:
        """This process's part of the batch was trained on; of a packed one the pairs of its documents count.

        Args:
            inputs: a batch with input_ids, or a list of samples; what has none yet (TRL's prompts) counts no tokens.
        """
        if self._settings is None:
            return
        packed, ranks = self._settings.packed, self._settings.group.size
        for rows, tokens in _sizes(inputs):
            whole = tokens if self._whole_rows else tokens * ranks
            if packed is not None and packed[0] == (rows, tokens):
                documents = packed[1]
                self._tokens += documents.n_tokens / ranks
                self._operations += self._operations_of(documents.n_tokens, documents) / ranks
            else:
                self._tokens += rows * whole / ranks
                self._operations += rows * self._operations_of(whole) / ranks

    def _operations_of(self, n_tokens: int, documents: Any = None) -> float:
        """Of a step of one sequence, or of one packed row."""
        settings = self._settings
        vocabulary = settings.config.get_text_config().vocab_size
        return strict_flops(settings.sizes, vocabulary, n_tokens, full=self._full, documents=documents)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count. The device is waited for at both ends; may be nested."""
        if self._paused or self._began is None:
            yield
            return
        self._paused, began = True, self._now()
        try:
            yield
        finally:
            self._paused = False
            self._began += self._now() - began

    def _now(self) -> float:
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def log(self, step: int) -> dict[str, float]:
        """What was done since the last log, by all processes; every one must call it. {} where nothing was.

        Args:
            step: optimizer steps that are done.

        Returns:
            step_seconds: of an optimizer step, on average.
            tokens_per_second: of all processes, padding that is computed included; where any were counted.
            strict_mfu: of a GPU, on average, likewise, where its peak is known: no recomputation, attention at half.
            device_peak_gib: the most that was allocated on any GPU so far.
            host_gib: host memory that holds K, V and checkpoints, of all processes together.
        """
        if self._began is None or self._settings is None:
            return {}
        now = self._now()
        seconds, self._began = max(now - self._began, 1e-9), now
        device = self._accelerator.device
        allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        pinned = self._settings.store.used_bytes()["pinned"]
        own = torch.tensor([[self._tokens, self._operations, allocated, pinned]], dtype=torch.float64, device=device)
        gather = getattr(self._accelerator, "gather_of_ranks", self._accelerator.gather)
        tokens, operations, devices, hosts = zip(*gather(own).tolist(), strict=True)
        steps, self._step = max(step - self._step, 1), step
        self._tokens, self._operations = 0.0, 0.0
        logs = {"step_seconds": seconds / steps}
        if any(tokens):
            logs["tokens_per_second"] = sum(tokens) / seconds
        if any(tokens) and (peak := device_peak()) is not None:
            logs["strict_mfu"] = sum(operations) / len(operations) / seconds / peak
        if device.type == "cuda":
            logs["device_peak_gib"] = max(devices) / GIB
        return {**logs, "host_gib": sum(hosts) / GIB}


def _sizes(inputs: Any) -> Iterator[tuple[int, int]]:
    """(rows, tokens of each) of what a trainer trains on, as far as it says."""
    if isinstance(inputs, Mapping):
        ids = inputs.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            yield ids.shape[0], ids.shape[1]
    elif isinstance(inputs, (list, tuple)):
        samples = (sample.get("input_ids") for sample in inputs if isinstance(sample, Mapping))
        yield from ((1, len(ids)) for ids in samples if isinstance(ids, (list, tuple, Tensor)) and len(ids))
