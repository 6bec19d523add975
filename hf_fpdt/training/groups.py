"""Groups of ranks as the processes of a Trainer that makes its loss of whole rows, as TRL's do.

Each rank of a group is given the same rows, makes the same loss of them and logs the same. So what such a Trainer
counts of processes are groups: their number, their places, and of all that is gathered each group's once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import operations, recursively_apply
from torch import Tensor, nn

from ..parallel import SequenceParallelGroup

# What accelerate.gather and accelerate.gather_object do where there are several processes.
_GATHERS = ("_gpu_gather", "_gpu_gather_object")
_ranks: ContextVar[int] = ContextVar("fpdt_ranks_of_process", default=1)


def takes_whole_rows(trainer: type) -> bool:
    """Whether a Trainer class makes its loss of whole rows: TRL's do."""
    return any(base.__module__.startswith("trl.") for base in trainer.__mro__)


def scores_between(trainer: Any) -> bool:
    """Whether a reference may be scored between a pass and its backward pass.

    Of TRL's trainers DPO's and KTO's do so, unless they did before training; the others do so beforehand, or never.
    """
    own = any(base.__module__.startswith("trl.trainer.") for base in type(trainer).__mro__)
    return not own or not getattr(trainer.args, "precompute_ref_log_probs", True)


@contextmanager
def groups_count(ranks: int) -> Iterator[None]:
    """Inside, what accelerate gathers has that of the first of each so many ranks; 1: of every process."""
    if ranks > 1:
        _gather_by_groups()
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def _gather_by_groups() -> None:
    """From now on accelerate's functions heed `groups_count`; TRL calls them by the names that it imported."""
    for name, wrap in zip(_GATHERS, (_of_groups, _objects_of_groups), strict=True):
        gather = getattr(operations, name, None)
        if gather is None:
            raise NotImplementedError(
                f"hf_fpdt: this release of accelerate gathers in another way (it has no {name}), so a group's rows "
                "would be counted once for each of its ranks: take accelerate 1.15, or set sp_size=1."
            )
        if not hasattr(gather, "fpdt_inner"):
            heeding = wrap(gather)
            heeding.fpdt_inner = gather  # type: ignore[attr-defined]
            setattr(operations, name, heeding)


def _of_groups(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def gathered(tensor: Any) -> Any:
        whole, ranks = gather(tensor), _ranks.get()
        if ranks == 1:
            return whole
        processes = torch.distributed.get_world_size()
        return recursively_apply(
            lambda rows: rows.unflatten(0, (processes, len(rows) // processes))[::ranks].flatten(0, 1), whole
        )

    return gathered


def _objects_of_groups(gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def gathered(objects: Any) -> Any:
        if (ranks := _ranks.get()) == 1:
            return gather(objects)
        return [each for of_rank in gather([objects])[::ranks] for each in of_rank]

    return gathered


class GroupAccelerator(Accelerator):
    """An Accelerator whose processes are groups of ranks; which of them is the main process stays what it was."""

    fpdt_group: SequenceParallelGroup

    @property
    def num_processes(self) -> int:
        """Groups of the job."""
        return int(self.state.num_processes) // self.fpdt_group.size

    @property
    def process_index(self) -> int:
        """The place of this rank's group among them."""
        return int(self.state.process_index) // self.fpdt_group.size

    def gather(self, tensor: Any) -> Any:
        """As `Accelerator.gather`, of groups."""
        with groups_count(self.fpdt_group.size):
            return super().gather(tensor)

    def gather_of_ranks(self, tensor: Any) -> Any:
        """As `Accelerator.gather`, of every rank."""
        with groups_count(1):
            return super().gather(tensor)

    def gather_for_metrics(self, input_data: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Accelerator.gather_for_metrics`, of groups."""
        with groups_count(self.fpdt_group.size):
            return super().gather_for_metrics(input_data, *args, **kwargs)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """As `Accelerator.split_between_processes`, between groups: what is found is gathered of them."""
        groups: Any = SimpleNamespace(
            num_processes=self.num_processes, process_index=self.process_index, device=self.device
        )
        with PartialState.split_between_processes(groups, inputs, apply_padding) as own:
            yield own

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """As `Accelerator.reduce`, over groups."""
        if reduction not in ("sum", "mean"):
            return super().reduce(tensor, reduction, scale)
        if self.fpdt_group.rank:
            tensor = recursively_apply(torch.zeros_like, tensor, error_on_other_type=True)
        total = super().reduce(tensor, "sum", scale)
        groups = self.num_processes if reduction == "mean" else 1
        return recursively_apply(lambda value: value / groups, total) if groups > 1 else total


def count_groups(accelerator: Any, group: SequenceParallelGroup, args: Any) -> None:
    """From now on the accelerator's processes are groups, and so are those that arguments of a Trainer were made for.

    Args:
        args: GRPO's and RLOO's have a number of samples that all processes generate at a time; it becomes that of
            `steps_per_generation` steps of all groups.

    Raises:
        ValueError: completions of one prompt would be of several generations.
    """
    accelerator.__class__ = GroupAccelerator
    accelerator.fpdt_group = group
    if not hasattr(args, "generation_batch_size"):
        return
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if args.generation_batch_size == rows * args.world_size:  # else it was changed when another trainer was made
        args.generation_batch_size = rows * accelerator.num_processes
    evaluated = getattr(args, "num_generations_eval", None) or args.num_generations
    for name, samples, generations in (
        ("steps_per_generation", args.generation_batch_size, args.num_generations),
        ("per_device_eval_batch_size", args.per_device_eval_batch_size * accelerator.num_processes, evaluated),
    ):
        evaluates = args.do_eval or str(args.eval_strategy.value) != "no"
        if samples % generations and (name == "steps_per_generation" or evaluates):
            raise ValueError(
                f"hf_fpdt: {accelerator.num_processes} group(s) of {group.size} ranks generate {samples} samples at a "
                f"time, which {generations} completions of a prompt do not divide: change {name} or the batch size "
                "of a device (ranks of a group count as one)."
            )


def share_random_state(group: SequenceParallelGroup) -> None:
    """Every rank of the group goes on with the random numbers of its first: of Python, NumPy and PyTorch."""
    if group.size == 1:
        return
    cuda = torch.cuda.is_available()
    own = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
    )
    python, numpy, cpu, device = group.of_first(own)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(device)


@contextmanager
def generation_shared(model: Any, group: SequenceParallelGroup) -> Iterator[None]:
    """Inside, what `model.generate` samples is what the group's first rank samples, on all of them.

    All of them run it, since FSDP2 needs every rank for its weights.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if group.size == 1 or not isinstance(inner, nn.Module) or not hasattr(inner, "generate"):
        yield
        return
    generate: Any = inner.generate
    before = vars(inner).get("generate")

    def shared(*args: Any, **kwargs: Any) -> Any:
        sampled = generate(*args, **kwargs)
        if not isinstance(sampled, Tensor):
            raise NotImplementedError(
                "hf_fpdt: with sp_size above 1 generate() must give token ids alone, without return_dict_in_generate."
            )
        found = group.of_first(sampled.cpu()).to(sampled.device)
        share_random_state(group)  # it may have drawn longer
        return found

    vars(inner)["generate"] = shared
    try:
        yield
    finally:
        if before is None:
            del vars(inner)["generate"]
        else:
            vars(inner)["generate"] = before
