"""The chunked loss and norm against whole logits: values, gradients, and every later scaling of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_fpdt.engine.loss import Head, chunked_loss, norm_by_chunks
from hf_fpdt.labels import shifted
from tests.helpers.support import assert_rejects, relative_error

VOCAB, WIDTH = 61, 24


def data(n_tokens: int = 37, rows: int = 2, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=True, dtype=dtype)
    hidden = (4 * torch.randn(rows, n_tokens, WIDTH, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows, n_tokens))
    return head, hidden, labels.masked_fill(torch.rand(labels.shape) < 0.3, -100)


def ours(head: nn.Linear, hidden: Tensor, labels: Tensor, size: int = 16, **kwargs: object) -> Tensor:
    described = Head(head, list(head.parameters()), size)
    return chunked_loss(described, hidden, shifted(labels), **kwargs)  # type: ignore[arg-type]


def whole(head: nn.Linear, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """transformers' loss, without its fp32 cast where the logits are float64."""
    total = nn.functional.cross_entropy(head(hidden).flatten(0, 1), shifted(labels).flatten(), reduction="sum")
    return total / ((shifted(labels) != -100).sum() if num_items is None else num_items)


def gradients(loss: Tensor, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 74, 1000])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(11)])
def test_loss_and_gradients_equal_those_of_whole_logits(size: int, num_items: Tensor | int | None) -> None:
    head, hidden, labels = data()
    exact = gradients(whole(head, hidden, labels, num_items), head, hidden)

    def check(loss: Tensor) -> None:
        for a, b in zip(gradients(loss, head, hidden), exact, strict=True):
            assert relative_error(a, b) < 1e-12

    check(ours(head, hidden, labels, size, num_items=num_items))
    assert_rejects(
        check,
        {
            "labels off by one": ours(head, hidden, labels.roll(1, 1), size, num_items=num_items),
            "unshifted labels": chunked_loss(Head(head, list(head.parameters()), size), hidden, labels, num_items),
            "last token dropped": ours(head, hidden[:, :-1], labels[:, :-1], size, num_items=num_items),
            "divided twice": ours(head, hidden, labels, size, num_items=num_items) / 2,
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_twice_the_error_of_transformers(dtype: torch.dtype) -> None:
    head, hidden, labels = data(200, dtype=dtype)
    wide_head, wide_hidden = nn.Linear(WIDTH, VOCAB).double(), hidden.detach().double().requires_grad_()
    wide_head.load_state_dict(head.state_dict())
    exact = gradients(whole(wide_head, wide_hidden, labels), wide_head, wide_hidden)
    naive = gradients(ForCausalLMLoss(head(hidden), labels, VOCAB), head, hidden)
    results = gradients(ours(head, hidden, labels), head, hidden)
    for name, a, b, t in zip(("loss", "hidden", "weight", "bias"), results, naive, exact, strict=True):
        assert a.dtype == b.dtype
        our_error, naive_error = (float((x.double() - t).norm()) for x in (a, b))
        assert our_error <= 2 * naive_error + half_ulp(t, dtype), f"{name}: {our_error:.2e} and {naive_error:.2e}"


def half_ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """Norm of the error that rounding alone may leave; a single number can be right by luck."""
    return float(truth.norm()) * torch.finfo(dtype).eps / 2


def test_scaling_after_the_fact_scales_the_gradients() -> None:
    """Gradient accumulation divides, Trainer multiplies by processes, a GradScaler by thousands: all afterwards."""
    head, hidden, labels = data()
    plain = gradients(ours(head, hidden, labels), head, hidden)
    scaled = gradients(ours(head, hidden, labels) * 3 / 8, head, hidden)
    for a, b in zip(plain, scaled, strict=True):
        assert relative_error(b, a * 3 / 8) < 1e-14


def test_no_gradient_is_formed_that_nobody_wants() -> None:
    head, hidden, labels = data()
    head.requires_grad_(False)
    ours(head, hidden, labels).backward()
    assert hidden.grad is not None and head.weight.grad is None
    head.requires_grad_(True)
    ours(head, hidden.detach(), labels).backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not ours(head, hidden, labels).requires_grad


def test_a_second_backward_through_one_loss_raises() -> None:
    head, hidden, labels = data()
    loss = ours(head, hidden, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        loss.backward()


def test_logits_never_exceed_the_chunk() -> None:
    head, hidden, labels = data(n_tokens=100)
    seen: list[int] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.shape[0] * x.shape[1])
        return head(x)

    chunked_loss(Head(spy, list(head.parameters()), 32), hidden, shifted(labels))
    assert max(seen) <= 32 and sum(seen) == 200


def test_autocast_trains_the_head() -> None:
    """A weight cast without grad must not be found in autocast's cache with grad."""
    head, hidden, labels = data(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            head(hidden)
        loss = ours(head, hidden, labels)
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)], ids=["layer", "rms"])
def test_norm_by_chunks_equals_the_norm(norm: nn.Module) -> None:
    norm = norm.double()
    _, hidden, _ = data()
    parameters, cotangent = list(norm.parameters()), torch.randn_like(hidden)
    expected = torch.autograd.grad(norm(hidden), [hidden, *parameters], cotangent)

    def check(size: int, forward: object = norm) -> None:
        output = norm_by_chunks(forward, hidden, parameters, size)  # type: ignore[arg-type]
        results = torch.autograd.grad(output, [hidden, *parameters], cotangent)
        for a, b in zip(results, expected, strict=True):
            assert relative_error(a, b) < 1e-12

    for size in (1, 10, 37, 100):
        check(size)
    assert_rejects(lambda forward: check(10, forward), {"doubled": lambda x: 2 * norm(x)})
