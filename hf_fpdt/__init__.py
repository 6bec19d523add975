"""hf_fpdt: train a stock Hugging Face decoder on sequences of millions of tokens, exactly.

FPDT, the Fully Pipelined Distributed Transformer (arXiv 2408.16978), for transformers. Importing this package
registers `attn_implementation="fpdt"`; it needs no GPU.
"""

import importlib
from typing import TYPE_CHECKING

from .config import FPDTPlugin
from .engine import attend_whole
from .model import FPDTHandle, apply_fpdt, chunked_log_probs, register
from .parallel import ShardingCollator

if TYPE_CHECKING:
    from .training import FPDTAccelerator, FPDTTrainer, FPDTTrainerMixin, PackedRows, PackedStream, PackingCollator

__version__ = "0.1.0"
__all__ = [
    "FPDTAccelerator",
    "FPDTHandle",
    "FPDTPlugin",
    "FPDTTrainer",
    "FPDTTrainerMixin",
    "PackedRows",
    "PackedStream",
    "PackingCollator",
    "ShardingCollator",
    "apply_fpdt",
    "attend_whole",
    "chunked_log_probs",
]

register()


def __getattr__(name: str) -> object:
    """What is of `training` comes when it is asked for: Trainer imports PEFT, and PEFT bitsandbytes, for seconds."""
    if name not in __all__:
        raise AttributeError(f"hf_fpdt: the package has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(".training", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
