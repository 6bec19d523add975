"""Log-probabilities of tokens, with what else is asked of their distributions: `function`, chunk by chunk.

`statistics` is what one chunk's logits say, and the gradient that comes back into them.
"""

from .function import LastUse, LogProbs, chunked_log_probs
from .statistics import STATISTICS

__all__ = ["LastUse", "LogProbs", "STATISTICS", "chunked_log_probs"]
