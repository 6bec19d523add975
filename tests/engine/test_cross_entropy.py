"""Cross-entropy and its gradient in one go, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fpdt.engine.cross_entropy import cross_entropy
from hf_fpdt.engine.cross_entropy.step import _plain
from tests.helpers.support import assert_as_accurate, assert_rejects

IGNORED = -7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def data(vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Peaked logits [T, V], and labels of which some are ignored and some are the peak."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (8 * torch.randn(37, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (37,), generator=generator)
    labels[::3] = logits.argmax(-1)[::3]
    labels[::5] = IGNORED
    return logits.to(device), labels.to(device)


def pytorchs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    loss = F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 61, 4096, 9001])
def test_as_accurate_as_pytorch(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    logits, labels = data(vocabulary, dtype, device)
    exact = pytorchs(logits.double(), labels)
    naive = pytorchs(logits, labels)

    def check(found: tuple[Tensor, Tensor | None]) -> None:
        loss, gradient = found
        assert gradient is not None and gradient.dtype == dtype
        assert_as_accurate(loss, naive[0], exact[0], name="loss")
        assert_as_accurate(gradient, naive[1], exact[1], name="gradient")

    def ours(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return cross_entropy(logits, labels, IGNORED, wants_gradient=True)

    check(ours(logits, labels))
    assert cross_entropy(logits, labels, IGNORED, wants_gradient=False)[1] is None
    if vocabulary > 1:
        other = torch.where(labels == IGNORED, labels, (labels + 1) % vocabulary)
        everything = labels.clamp(min=0)
        broken = {"labels off by one": ours(logits, other), "nothing ignored": ours(logits, everything)}
        lower = logits.clone()
        lower[1, logits[1].argmax()] = -50
        broken["a peak dropped"] = ours(lower, labels)
        assert_rejects(check, broken)


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_logits_have_no_weight(device: str) -> None:
    """A model may mask entries of its vocabulary by -inf."""
    logits, labels = data(61, torch.float32, device)
    logits[:, 50:], labels = float("-inf"), labels.clamp(max=49)
    loss, gradient = cross_entropy(logits, labels, IGNORED, wants_gradient=True)
    expected, d_expected = pytorchs(logits, labels)
    torch.testing.assert_close((loss, gradient), (expected, d_expected))


def test_a_label_out_of_range_is_refused_on_a_cpu() -> None:
    logits, labels = data(61, torch.float32, "cpu")
    labels[4] = 61
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(logits, labels, IGNORED, wants_gradient=True)


@pytest.mark.gpu
def test_gpu_a_label_out_of_range_makes_the_loss_nan() -> None:
    logits, labels = data(61, torch.float32, "cuda")
    labels[4] = 61
    assert cross_entropy(logits, labels, IGNORED, wants_gradient=True)[0].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_the_kernel_and_its_plain_twin_agree(dtype: torch.dtype) -> None:
    logits, labels = data(9001, dtype, "cuda")
    strided = torch.cat([logits, logits], 1)[:, :9001]
    ours, plain = (
        cross_entropy(strided, labels, IGNORED, wants_gradient=True),
        _plain(logits, labels, IGNORED, wants_gradient=True),
    )
    torch.testing.assert_close(ours, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
