"""FPDT in transformers' Trainer: a mixin for any Trainer class, and the ready `FPDTTrainer`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from ..config import FPDTPlugin
from ..labels import IGNORE_INDEX
from ..model import applied_settings, apply_fpdt, has_fpdt, may_get_fpdt, train_with
from ..parallel import PADDING_KEY, SAMPLE_KEY, SequenceParallelGroup, ShardingCollator, ignore_first_tokens
from .evaluation import Evaluation, filled, first_rows
from .groups import (
    count_groups,
    generation_shared,
    groups_count,
    scores_between,
    share_random_state,
    takes_whole_rows,
)
from .loaders import join_group, leave_to_host, rows_joined, sharding_collator
from .packing import LENGTHS, PackingCollator
from .refused import refused_evaluation, refused_options, refused_prompts, refused_sharing
from .saying import say_what_is_done
from .speed import TrainingSpeed


class FPDTTrainerMixin:
    """Mix in before a Trainer class: `class MyTrainer(FPDTTrainerMixin, SFTTrainer)`.

    Everything that Trainer counts stays what it is without sequence parallelism: the batch size is that of the
    data-parallel groups, losses are means over tokens, `evaluate()` gives the loss that one process gives, also where
    the set does not divide (of a set without a length, and where the Trainer class has an evaluation sampler of its
    own, the rows that Accelerate repeats at the end count too).

    TRL's trainers make their loss of whole rows. With `sp_size` above 1 every rank of a group is given them, the model
    cuts them, and what TRL counts of processes are groups.

    Args:
        fpdt_plugin: settings; None: `FPDTPlugin()`, which reads FPDT_* environment variables.
        *args, **kwargs: as for the Trainer class.

    Raises:
        NotImplementedError: an option of the Trainer that cannot be honoured exactly; every one is named.
    """

    fpdt_group: SequenceParallelGroup
    _fpdt_evaluation: Evaluation | None = None
    _fpdt_speed: TrainingSpeed | None = None
    _fpdt_whole_rows = False

    def __init__(self, *args: Any, fpdt_plugin: FPDTPlugin | None = None, **kwargs: Any) -> None:
        self.fpdt_plugin = FPDTPlugin() if fpdt_plugin is None else fpdt_plugin
        model = kwargs.get("model", args[0] if args else None)
        # TRL takes the name of a model too.
        self._fpdt_applied = applied_settings(model) if isinstance(model, nn.Module) else None
        self._fpdt_whole_rows = self.fpdt_plugin.sp_size > 1 and takes_whole_rows(type(self))
        with self._fpdt_processes():
            super().__init__(*args, **kwargs)
        trainer: Any = self
        whole_rows = refused_sharing(trainer) if self._fpdt_whole_rows else []
        evaluated = refused_evaluation(trainer, self._data_parallel_size())
        _refuse([*refused_options(trainer, self.fpdt_group.size), *whole_rows, *evaluated])
        if not has_fpdt(trainer.model, self.fpdt_plugin, self.fpdt_group):
            self.fpdt_handle = apply_fpdt(trainer.model, self.fpdt_plugin, self.fpdt_group)
        if (settings := applied_settings(trainer.model)) is not None:
            settings.between = scores_between(trainer)
        _refuse(refused_prompts(trainer))
        reference = getattr(trainer, "ref_model", None)  # TRL's, where it is no adapter of the model
        if isinstance(reference, nn.Module) and may_get_fpdt(reference):
            apply_fpdt(reference, self.fpdt_plugin, self.fpdt_group)
        if self._fpdt_whole_rows:
            _check_whole(trainer.data_collator)
            share_random_state(self.fpdt_group)  # TRL seeds processes apart
            return
        settings = applied_settings(trainer.model)
        trainer.data_collator = sharding_collator(
            trainer.data_collator,
            self.fpdt_plugin,
            self.fpdt_group,
            on_gpu=trainer.args.device.type == "cuda",
            pad_token_id=_pad_token_id(trainer),
            two_each=settings is not None and settings.recurrent,
        )

    def _fpdt_processes(self) -> AbstractContextManager[None]:
        """Inside, processes are counted as this trainer takes rows."""
        return groups_count(self.fpdt_plugin.sp_size) if self._fpdt_whole_rows else nullcontext()

    def _fpdt_generation(self) -> AbstractContextManager[None]:
        """Inside, ranks that share rows share what is sampled."""
        return generation_shared(self.model, self.fpdt_group) if self._fpdt_whole_rows else nullcontext()  # type: ignore[attr-defined]

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; then the sequence-parallel groups are built beside the accelerator."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        # Trainer sets transformers to this level later.
        say_what_is_done(self.args.get_process_log_level())  # type: ignore[attr-defined]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        applied = None if self._fpdt_applied is None else self._fpdt_applied.group
        whole = self._fpdt_whole_rows
        self.fpdt_group = join_group(accelerator, self.fpdt_plugin, applied, by_mesh=not whole)
        if whole:
            count_groups(accelerator, self.fpdt_group, self.args)  # type: ignore[attr-defined]

    def _set_signature_columns_if_needed(self) -> None:
        """As Trainer's; what tells documents of a row apart is no argument of the model, and is not taken away."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        collator: Any = self.data_collator  # type: ignore[attr-defined]
        columns: list[str] = self._signature_columns  # type: ignore[attr-defined]
        if isinstance(getattr(collator, "inner", collator), PackingCollator) and LENGTHS not in columns:
            columns.append(LENGTHS)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; "auto" leaves the memory that this optimizer takes."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        train_with(self.model, optimizer)  # type: ignore[attr-defined]
        return optimizer

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; each new model gets FPDT, and the last one's host memory."""
        previous = getattr(self, "fpdt_handle", None)
        if previous is not None:
            previous.store.close()
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc]
        self.fpdt_handle = apply_fpdt(model, self.fpdt_plugin, self.fpdt_group)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; training logs also have the speed and memory of `TrainingSpeed.log`."""
        self._fpdt_speed = TrainingSpeed(self.accelerator, whole_rows=self._fpdt_whole_rows)  # type: ignore[attr-defined]
        leave_to_host(self.model)  # type: ignore[attr-defined]
        try:
            with self._fpdt_processes():
                return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._fpdt_speed = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; its tokens are counted."""
        if self._fpdt_speed is not None:
            self._fpdt_speed.begin(model, self.state.global_step)  # type: ignore[attr-defined]
        with self._fpdt_generation():
            step: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self._fpdt_speed is not None:
            self._fpdt_speed.count(inputs)
        return step

    def log(self, logs: dict[str, float], start_time: float | None = None, **kwargs: Any) -> None:
        """As Trainer's; with the speed since the last log where it is one of training steps."""
        # Those alone have both; every process logs them, so that processes can be asked.
        if self._fpdt_speed is not None and start_time is not None and "loss" in logs:
            logs.update(self._fpdt_speed.log(self.state.global_step))  # type: ignore[attr-defined]
        super().log(logs, start_time, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; in the middle of training it does not count as training time."""
        with self._fpdt_processes(), nullcontext() if self._fpdt_speed is None else self._fpdt_speed.paused():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        with self._fpdt_processes():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> float:
        """As Trainer's; of whole rows, which ranks share, this one's part."""
        operations: float = super().floating_point_ops(inputs)  # type: ignore[misc]
        return operations / self.fpdt_group.size if self._fpdt_whole_rows else operations

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples an optimizer step: ranks of a group share theirs."""
        return int(super().get_total_train_batch_size(args)) // self.fpdt_group.size  # type: ignore[misc]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Evaluation averages each batch by itself, as one process does: not over the batches of other ranks.
        if self._fpdt_evaluation is not None:
            return None
        for batch in batch_samples:
            if isinstance(batch, Mapping):
                ignore_first_tokens(batch, IGNORE_INDEX)
        return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Trainer tells padding by a mask, which a rank's part has none of.
        if isinstance(inputs, Mapping) and SAMPLE_KEY in inputs:
            padding = inputs.get(PADDING_KEY, torch.zeros_like(inputs["input_ids"]))
            inputs = {**inputs, "attention_mask": padding == 0}
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]

    def _get_dataloader(self, dataset: Dataset, description: str, batch_size: int, **kwargs: Any) -> DataLoader:
        """Evaluation sets are filled up to whole batches on every rank; `prediction_step` leaves the filling out."""
        sized: Any = dataset
        sampler = getattr(kwargs.get("sampler_fn"), "__func__", Trainer._get_eval_sampler)
        # A sampler of the class's own (TRL's repeats prompts) says what is evaluated, and how often.
        left_alone = kwargs.get("is_training") or sampler is not Trainer._get_eval_sampler
        rows = samples = None if isinstance(dataset, IterableDataset) or left_alone else len(sized)
        if rows is not None:
            kwargs["sampler_fn"] = SequentialSampler
            # One rank's last batch may be shorter.
            ranks = self._data_parallel_size()
            multiple = batch_size * ranks if ranks > 1 else 1
            dataset, rows = filled(dataset, rows, multiple), rows if rows % multiple else None
        with rows_joined(self, is_training=bool(kwargs.get("is_training"))):
            loader = super()._get_dataloader(dataset, description, batch_size, **kwargs)  # type: ignore[misc]
        loader.fpdt_rows, loader.fpdt_samples = rows, samples
        seeded = loader.worker_init_fn
        if isinstance(seeded, functools.partial) and "rank" in seeded.keywords:
            # What a dataset draws in a worker must be the same on all ranks of a group.
            loader.base_dataloader.worker_init_fn = functools.partial(seeded, rank=self._data_parallel_rank())
        return loader

    def _data_parallel_rank(self) -> int:
        return int(self.args.process_index) // self.fpdt_group.size  # type: ignore[attr-defined]

    def _data_parallel_size(self) -> int:
        return int(self.args.world_size) // self.fpdt_group.size  # type: ignore[attr-defined]

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the loss is the mean over samples that one process would report.

        As in Trainer, `logging_nan_inf_filter` leaves out batches without a loss (no label that counts).
        """
        rows = getattr(dataloader, "fpdt_rows", None)
        arguments: Any = self.args  # type: ignore[attr-defined]
        self._fpdt_evaluation = Evaluation(
            rows,
            self._data_parallel_rank(),
            self._data_parallel_size(),
            finite_only=arguments.logging_nan_inf_filter,
            samples=getattr(dataloader, "fpdt_samples", None),
            batch_size=arguments.eval_batch_size,
        )
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
            loss = self._fpdt_evaluation.loss(self.accelerator)  # type: ignore[attr-defined]
        finally:
            evaluation, self._fpdt_evaluation = self._fpdt_evaluation, None
        if loss is not None:
            name = next(name for name in output.metrics if name.endswith("_loss"))
            output.metrics[name] = loss
        if evaluation.rows is None:
            return output
        arrays = {
            name: first_rows(getattr(output, name), evaluation.rows, arguments.eval_do_concat_batches)
            for name in ("predictions", "label_ids")
        }
        return output._replace(num_samples=evaluation.rows, **arrays)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's, on the rows that are not filling; the loss is that of the group's whole batch.

        With ranks that share sequences there is the loss alone.
        """
        evaluation = self._fpdt_evaluation
        counted = 0 if evaluation is None else evaluation.next_rows(inputs)
        loss_only = prediction_loss_only or self._fpdt_whole_rows
        with self._fpdt_generation():
            loss, logits, labels = super().prediction_step(model, inputs, loss_only, *args, **kwargs)  # type: ignore[misc]
        if loss is None and self.fpdt_group.size > 1:
            raise NotImplementedError(
                "hf_fpdt: predict() without labels gives logits, which are cut over ranks: set sp_size=1."
            )
        if loss is not None:
            loss = self.fpdt_group.sum(loss) / self.fpdt_group.size
            if evaluation is not None:
                evaluation.add(loss, counted)
        return (loss, logits, labels) if self.fpdt_group.size == 1 else (loss, None, None)


class FPDTTrainer(FPDTTrainerMixin, Trainer):
    """transformers' `Trainer` with FPDT: `accelerate launch` starts processes, the plugin's `sp_size` groups them."""


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise NotImplementedError(f"hf_fpdt: FPDT cannot run this Trainer: {'; '.join(reasons)}.")


def _check_whole(collator: Any) -> None:
    if isinstance(collator, ShardingCollator):
        raise ValueError(
            "hf_fpdt: TRL's trainers take whole rows, which the model cuts: pass the collator that is inside of the "
            "ShardingCollator."
        )


def _pad_token_id(trainer: Any) -> int:
    vocabulary = trainer.model.config.get_text_config().vocab_size
    for owner in (trainer.processing_class, trainer.model.config):
        token = getattr(owner, "pad_token_id", None)
        if token is not None and 0 <= int(token) < vocabulary:
            return int(token)
    return 0
