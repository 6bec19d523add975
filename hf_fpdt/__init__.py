"""hf_fpdt: train a stock Hugging Face decoder on sequences of millions of tokens, exactly.

FPDT, the Fully Pipelined Distributed Transformer (arXiv 2408.16978), for transformers. Importing this package
registers `attn_implementation="fpdt"`; it needs no GPU.
"""

from .config import FPDTPlugin
from .engine import attend_whole
from .model import FPDTHandle, apply_fpdt, chunked_log_probs, register
from .parallel import ShardingCollator
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
