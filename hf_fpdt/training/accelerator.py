"""FPDT under Accelerate: sequence-parallel groups beside DDP or FSDP2 over the whole world.

Ranks of a group read the same samples and cut them (`ShardingCollator`); gradients are averaged over ALL ranks, by DDP
or FSDP2 as ever. No `ParallelismConfig` takes part: its own sequence-parallel ranks would not reduce gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..config import FPDTPlugin
from ..model import FPDTHandle, applied_settings, apply_fpdt, has_fpdt, train_with
from .loaders import agreed_seeds, join_group, leave_to_host, sharding_collator
from .saying import say_what_is_done


class FPDTAccelerator(Accelerator):
    """`Accelerator` whose `prepare` runs models chunk by chunk and gives each rank its part of every sequence.

    Models are prepared as by `apply_fpdt`; data loaders (map-style or iterable) yield cut batches; optimizers and
    schedulers are Accelerate's. The loss needs no normalisation of one's own: the mean over ranks of what the model
    returns is the mean over tokens of each sequence, and DDP and FSDP2 average gradients the same way.

    Args:
        fpdt_plugin: settings; None: `FPDTPlugin()`, which reads FPDT_* environment variables.
        *args, **kwargs: as for `Accelerator`.

    Raises:
        ValueError: `sp_size` does not divide the processes.
        NotImplementedError: an option that cannot be honoured exactly; every one is named.
    """

    def __init__(self, *args: Any, fpdt_plugin: FPDTPlugin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        say_what_is_done()
        self.fpdt_plugin = FPDTPlugin() if fpdt_plugin is None else fpdt_plugin
        self.fpdt_group = join_group(self, self.fpdt_plugin)
        self.fpdt_handles: list[FPDTHandle] = []
        self._recurrent = False

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As `Accelerator.prepare`; models get FPDT first."""
        models = [model for model in args if isinstance(model, nn.Module)]
        for model in models:
            self._apply(model)
        for optimizer in args:
            if isinstance(optimizer, Optimizer):
                self._train_with(models, optimizer)
        return super().prepare(*args, **kwargs)

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """As `Accelerator.prepare_model`; the model gets FPDT first."""
        self._apply(model)
        leave_to_host(model)
        return super().prepare_model(model, *args, **kwargs)

    def _train_with(self, models: list[nn.Module], optimizer: Optimizer) -> None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model in models:
            if any(id(parameter) in trained for parameter in model.parameters()):
                train_with(model, optimizer)

    def _apply(self, model: nn.Module) -> None:
        if not has_fpdt(model, self.fpdt_plugin, self.fpdt_group):
            self.fpdt_handles.append(apply_fpdt(model, self.fpdt_plugin, self.fpdt_group))
        settings = applied_settings(model)
        self._recurrent |= settings is not None and settings.recurrent

    def free_memory(self, *objects: Any) -> Any:
        """As `Accelerator.free_memory`; the handles are let go of."""
        self.fpdt_handles.clear()
        return super().free_memory(*objects)

    def gather_for_metrics(self, input_data: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Accelerator.gather_for_metrics`.

        Raises:
            NotImplementedError: ranks share sequences, so what it takes for repeated samples is not.
        """
        if self.fpdt_group.size > 1:
            raise NotImplementedError(
                "hf_fpdt: gather_for_metrics would drop ranks' parts of the last samples; take "
                "accelerator.reduce(loss, 'mean') of each batch."
            )
        return super().gather_for_metrics(input_data, *args, **kwargs)

    def prepare_data_loader(self, data_loader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        """As `Accelerator.prepare_data_loader`; the prepared loader yields this rank's part of each batch."""
        with agreed_seeds(self, self.fpdt_group, data_loader), self._cutting(data_loader):
            return super().prepare_data_loader(data_loader, *args, **kwargs)

    @contextmanager
    def _cutting(self, data_loader: DataLoader) -> Iterator[None]:
        """The loader with our collator, which the prepared one copies; the caller's is as before afterwards."""
        inner = data_loader.collate_fn
        data_loader.collate_fn = sharding_collator(
            inner, self.fpdt_plugin, self.fpdt_group, on_gpu=self._on_gpu, two_each=self._recurrent
        )
        try:
            yield
        finally:
            data_loader.collate_fn = inner

    @property
    def _on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")
