"""Labels: which number counts for nothing, which label is of which position, and what padding may not have."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

# What transformers and PyTorch leave out of a loss.
IGNORE_INDEX = -100


def shifted(labels_BS: Tensor, ignore_index: int = IGNORE_INDEX, *, fill: int = 0) -> Tensor:
    """Label of the NEXT token at every position, and `fill` more positions; the last one and those are ignored."""
    return pad(labels_BS, (0, 1 + fill), value=ignore_index)[:, 1:]


def check_padding(subject: str, padding_BS: Tensor, labels_BS: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
    """Padding on the right is not masked, so what it predicts is nobody's and may not count.

    Args:
        subject: whose message it is.
        padding_BS: true where there is padding.

    Raises:
        ValueError: a label of padding counts.
    """
    if bool((padding_BS & (labels_BS != ignore_index)).any()):
        raise ValueError(
            f"{subject}: attention_mask marks tokens as padding whose labels count; set the labels of padding to "
            f"{ignore_index} (a collator that pads labels does)."
        )
