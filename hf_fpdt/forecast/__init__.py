"""What a step takes on machines you name: seconds, the longest length. Integers and rates; no torch.

In reading order:

    fit          does a step fit, and what does it take
    searches     how long may it be, how little host memory is enough, what would help
    seconds      seconds of a step, and of what GPUs send each other
    collectives  how often and how much GPUs exchange
    rates        what known GPUs do in a second
    rates_file   rates that were measured, kept in a file
    corpus       documents that packed rows are made of
    curves       memory over a step; reach by host memory
"""

from .corpus import Corpus
from .curves import MemoryCurve, Reach, memory_curve, reach_by_host
from .fit import Machines, PlannedStep, Training, Use, Weights, fit, machine_bytes, peak_bytes
from .rates import GPU, GPUS, gpu_named, peak_of, with_memory
from .rates_file import HEAD_DIMS, read_rates, save_rates
from .searches import STEP_TOKENS, More, host_needed, longest, what_would_help
from .seconds import step_seconds, ulysses_seconds

__all__ = [
    "Corpus",
    "GPU",
    "GPUS",
    "HEAD_DIMS",
    "Machines",
    "MemoryCurve",
    "More",
    "PlannedStep",
    "Reach",
    "STEP_TOKENS",
    "Training",
    "Use",
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
