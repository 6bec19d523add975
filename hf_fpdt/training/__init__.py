"""Trainer, Accelerate, loaders, logs.

In reading order:

    trainer            FPDT in transformers' Trainer: a mixin for any Trainer class, and the ready `FPDTTrainer`
    evaluation         evaluation that gives one process's loss on any number of ranks
    accelerator        FPDT under Accelerate: sequence-parallel groups beside DDP or FSDP2 over the whole world
    loaders            telling an `Accelerator` of sequence-parallel groups, whose ranks read the same samples and
    speed              how fast training goes, for Trainer's logs: tokens a second, strict MFU, memory
"""

from .accelerator import FPDTAccelerator
from .loaders import join_group, sharding_collator
from .trainer import FPDTTrainer, FPDTTrainerMixin, refused_options

__all__ = [
    "FPDTAccelerator",
    "FPDTTrainer",
    "FPDTTrainerMixin",
    "join_group",
    "refused_options",
    "sharding_collator",
]
