"""Which tokens go to which experts, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIXERS = (0x2545F4914F6CDD1D, 0x5851F42D4C957F2D)  # odd
SMALL = 2**15  # experts that a 16-bit number counts: sorting takes time by the bits of a key


@dataclass(frozen=True)
class Routes:
    """Where each token's row is for each of its experts. T tokens visit K of E experts: S = T · K rows.

    Attributes:
        experts_TK: the experts of a token; a number from E on is none, its row counts for nothing.
        places_TK: the row of each.
        order_S: of each row its place in `experts_TK`, flat.
        experts_S: of each row its expert, ascending.
        offsets_E: int32, of each expert the end of its rows.
    """

    experts_TK: Tensor
    places_TK: Tensor
    order_S: Tensor
    experts_S: Tensor
    offsets_E: Tensor

    @classmethod
    def of(cls, experts_TK: Tensor, count: int) -> Routes:
        """Routes to `count` experts; nothing waits for the device."""
        flat = experts_TK.reshape(-1)
        # Stable: an expert reads its tokens in the order in which they lie.
        sorted_S, order_S = torch.sort(flat.to(torch.int16) if count < SMALL else flat, stable=True)
        experts_S = sorted_S.to(torch.int32)
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(len(flat), device=flat.device)
        every = torch.arange(count, device=flat.device, dtype=torch.int32)
        offsets_E = torch.searchsorted(experts_S, every, right=True, out_int32=True)
        return cls(experts_TK, places_S.view(experts_TK.shape), order_S, experts_S, offsets_E)

    def stamp(self) -> Tensor:
        """int64, one number of `experts_TK`: another where one place has another expert; where more have, but for a
        chance of 2^-64."""
        flat = self.experts_TK.reshape(-1)
        mixed = torch.arange(len(flat), device=flat.device) * (len(self.offsets_E) + 1) + flat
        for factor in MIXERS:  # each step can be undone, so a single token that changed always shows
            mixed = mixed * factor
            mixed = mixed ^ (mixed >> 32 & 0xFFFFFFFF)
        return mixed.sum()

    @property
    def tokens_S(self) -> Tensor:
        """The token of each row."""
        return self.order_S // self.experts_TK.shape[1]
