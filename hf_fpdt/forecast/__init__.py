"""What a step takes on machines you name: seconds, the longest length. Integers and rates; no torch.

In reading order:

    fit                whether a training step fits given machines, what it takes where and how long; and the
    seconds            seconds of a training step, and of what GPUs send each other in it. Numbers only; no torch
    collectives        what a training step costs, by arithmetic: which collectives it makes and the bytes that a
    rates              what known GPUs do in a second. Numbers only; no torch
    rates_file         rates of a machine's own GPU in a JSON file: `hf-fpdt check --rates` writes it, `hf-fpdt
    curves             what the picture of a plan shows, as numbers: memory over one step, and the longest length
"""

from .curves import CHECKPOINTS, KV, WORKING, MemoryCurve, Reach, memory_curve, reach_by_host
from .fit import (
    STEP_TOKENS,
    Machines,
    PlannedStep,
    Training,
    Weights,
    fit,
    host_needed,
    longest,
    machine_bytes,
    peak_bytes,
    what_would_help,
)
from .rates import GPU, GPUS, gpu_named, peak_of, with_memory
from .rates_file import HEAD_DIMS, read_rates, save_rates
from .seconds import step_seconds, ulysses_seconds

__all__ = [
    "CHECKPOINTS",
    "GPU",
    "GPUS",
    "HEAD_DIMS",
    "KV",
    "Machines",
    "MemoryCurve",
    "PlannedStep",
    "Reach",
    "STEP_TOKENS",
    "Training",
    "WORKING",
    "Weights",
    "fit",
    "gpu_named",
    "host_needed",
    "longest",
    "machine_bytes",
    "memory_curve",
    "peak_bytes",
    "peak_of",
    "reach_by_host",
    "read_rates",
    "save_rates",
    "step_seconds",
    "ulysses_seconds",
    "what_would_help",
    "with_memory",
]
