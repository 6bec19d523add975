"""Trainer, Accelerate, loaders, logs.

In reading order:

    trainer      `FPDTTrainerMixin` and `FPDTTrainer`
    refused      options of a Trainer that cannot be honoured
    evaluation   one process's loss on any number of ranks
    accelerator  `FPDTAccelerator`
    loaders      data loaders that know groups
    groups       groups of ranks as the processes of TRL's trainers
    packing      documents of every length in rows of one
    saying       what a run does, said once
    speed        tokens a second and MFU in the logs
"""

from .accelerator import FPDTAccelerator
from .loaders import join_group, sharding_collator
from .packing import LongDocuments, PackedRows, PackedStream, PackingCollator, PackingCounts, fitting_pieces, pack
from .refused import refused_options
from .saying import say_what_is_done
from .trainer import FPDTTrainer, FPDTTrainerMixin

__all__ = [
    "FPDTAccelerator",
    "FPDTTrainer",
    "FPDTTrainerMixin",
    "LongDocuments",
    "PackedRows",
    "PackedStream",
    "PackingCollator",
    "PackingCounts",
    "fitting_pieces",
    "join_group",
    "pack",
    "refused_options",
    "say_what_is_done",
    "sharding_collator",
]
