"""What a call asks of attention: one frozen description that travels from the registered function to the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..layout import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Causal attention of one layer. Sinks are not in it: they are merged once a row, and no kernel need know them.

    Attributes:
        scale: factor of the scores before softmax.
        head_dim: width of a query's and a key's head.
        value_dim: width of a value's head.
        grouped: whether several query heads share a key head.
        window: keys a query sees, its own included; None: all before it.
        softcap: bound of the scores, softcap · tanh(score / softcap); None: none.
        packed: whether a row holds several documents.
    """

    scale: float
    head_dim: int
    value_dim: int
    grouped: bool = False
    window: int | None = None
    softcap: float | None = None
    packed: bool = False

    @classmethod
    def plain(cls, head_dim: int, scale: float | None = None) -> AttentionSpec:
        """Attention to everything before, keys and values of one width; scale None: 1/√head_dim."""
        return cls(scale=head_dim**-0.5 if scale is None else scale, head_dim=head_dim, value_dim=head_dim)

    @classmethod
    def of(
        cls,
        q_BSNH: Tensor,
        k_BTGH: Tensor,
        v_BTGH: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        packed: bool = False,
    ) -> AttentionSpec:
        """Of these tensors. Blocks are rows of their own, of which a kernel knows nothing."""
        return cls(
            scale=scale,
            head_dim=q_BSNH.shape[-1],
            value_dim=v_BTGH.shape[-1],
            grouped=q_BSNH.shape[2] != k_BTGH.shape[2],
            window=None if isinstance(window, Block) else window,
            softcap=softcap,
            packed=packed,
        )

    def __str__(self) -> str:
        widths = f"head_dim {self.head_dim}"
        widths += "" if self.value_dim == self.head_dim else f" for keys and {self.value_dim} for values"
        window = "" if self.window is None else f", window {self.window}"
        packed = ", several documents a row" if self.packed else ""
        return widths + window + ("" if self.softcap is None else f", softcap {self.softcap}") + packed
