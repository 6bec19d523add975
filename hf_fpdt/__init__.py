"""hf_fpdt: train a stock Hugging Face decoder on sequences of millions of tokens, exactly.

FPDT, the Fully Pipelined Distributed Transformer (arXiv 2408.16978), for transformers. Importing this package
registers `attn_implementation="fpdt"`; it needs no GPU.
"""

from .attention import attend_whole
from .config import FPDTPlugin
from .data import ShardingCollator
from .interface import register
from .model import FPDTHandle, apply_fpdt

__version__ = "0.1.0"
__all__ = ["FPDTHandle", "FPDTPlugin", "ShardingCollator", "apply_fpdt", "attend_whole"]

register()
