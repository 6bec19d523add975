"""The optimizer of the quickstart's base model is torch's Muon, but for the dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quickstart_model import Muon, orthogonal
from torch import nn

from tests.helpers.support import assert_rejects, relative_error

SHAPES = ((96, 256), (256, 96), (96, 96))


def moved(kind: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], **options: float) -> torch.Tensor:
    """How far three steps move a matrix."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape, generator=generator))
    before = matrix.detach().clone()
    optimizer = kind([matrix], lr=0.03, **options)
    for _ in range(3):
        matrix.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return matrix.detach() - before


@pytest.mark.parametrize("shape", SHAPES)
def test_it_moves_matrices_as_torch_does(shape: tuple[int, int]) -> None:
    theirs = moved(torch.optim.Muon, shape, weight_decay=0.0)

    def check(ours: torch.Tensor) -> None:
        assert relative_error(ours, theirs) < 0.02, "torch's is in bfloat16"

    check(moved(Muon, shape))
    assert_rejects(check, {"another momentum": moved(Muon, shape, momentum=0.9), "lr": 1.05 * moved(Muon, shape)})


@pytest.mark.parametrize("shape", SHAPES[:2])  # a square one of noise has values near zero
def test_an_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.5 and values.max() < 1.3
