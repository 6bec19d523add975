"""Log-probabilities by chunks against those of whole logits: values, statistics, gradients, one pass and two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fpdt.engine.log_probs import STATISTICS, LastUse, LogProbs, chunked_log_probs
from hf_fpdt.engine.loss import Head
from hf_fpdt.labels import shifted
from tests.engine.test_loss import VOCAB, WIDTH, data, half_ulp
from tests.helpers.support import assert_rejects, relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def ours(head: Any, hidden: Tensor, labels: Tensor, size: int = 16, **more: Any) -> LogProbs:
    parameters = list(head.parameters())
    return chunked_log_probs(Head(head, parameters, size), hidden, shifted(labels), **{"asked": STATISTICS, **more})


def whole(head: nn.Module, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> LogProbs:
    """By PyTorch, of whole logits."""
    targets = shifted(labels)
    logits = head(hidden)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p, mask = z.log_softmax(-1), targets != -100
    at = targets.clamp(min=0)[..., None]
    values = {
        "log_probs": log_p.gather(-1, at)[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == at[..., 0],
    }
    return LogProbs(label_mask=mask, **{name: value.masked_fill(~mask, 0) for name, value in values.items()})


def summed(found: LogProbs) -> Tensor:
    """What SFT makes of them."""
    return -found.log_probs.sum() / 7


def weighted(found: LogProbs) -> Tensor:
    """What preferences do: each token has a factor of its own."""
    weights = torch.linspace(-1, 2, found.log_probs.numel(), dtype=torch.float64, device=found.log_probs.device)
    return (found.log_probs * weights.view_as(found.log_probs)).sum()


def with_entropy(found: LogProbs) -> Tensor:
    assert found.entropy is not None
    return weighted(found) + 0.3 * (found.entropy * found.log_probs.detach().exp()).sum()


LOSSES = {"summed": summed, "weighted": weighted, "with entropy": with_entropy}


def gradients(loss: Tensor, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
    wanted = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trains", ["all", "the head", "what is below"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("size", "temperature"), [(1, 1.0), (7, 0.7), (1000, 1.0)])
def test_values_and_gradients_are_those_of_whole_logits(
    loss: str, size: int, temperature: float, trains: str, device: str
) -> None:
    head, hidden, labels = data()
    head, hidden, labels = head.to(device), hidden.detach().to(device), labels.to(device)
    hidden.requires_grad_(trains != "the head")
    head.requires_grad_(trains != "what is below")
    truth = whole(head, hidden, labels, temperature)
    exact, last_use = gradients(LOSSES[loss](truth), head, hidden), LastUse()

    def check(found: LogProbs) -> None:
        for name in ("log_probs", *STATISTICS):
            value, expected = getattr(found, name).double(), getattr(truth, name).double()
            assert relative_error(value, expected) < 1e-12, name
        for a, b in zip(gradients(LOSSES[loss](found), head, hidden), exact, strict=True):
            assert relative_error(a, b) < 1e-12

    more: dict[str, Any] = {"size": size, "temperature": temperature, "last_use": last_use}
    for _ in range(2):  # the second goes by what the first was used for
        check(ours(head, hidden, labels, **more))
        assert last_use.summed == (trains == "what is below" or loss == "summed")
    other = more | {"temperature": 1.3}
    assert_rejects(
        check,
        {
            "temperature lost": ours(head, hidden, labels, **other),
            "labels off by one": ours(head, hidden, labels.roll(1, 1), **more),
            "nothing counted": ours(head, hidden, labels.new_full(labels.shape, -100), **more),
        },
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_twice_the_error_of_whole_logits(dtype: torch.dtype, loss: str, device: str) -> None:
    head, hidden, labels = data(200, dtype=dtype)
    head, hidden, labels = head.to(device), hidden.detach().to(device).requires_grad_(), labels.to(device)
    wide_head, wide_hidden = nn.Linear(WIDTH, VOCAB).to(device).double(), hidden.detach().double().requires_grad_()
    wide_head.load_state_dict(head.state_dict())
    exact = gradients(LOSSES[loss](whole(wide_head, wide_hidden, labels)), wide_head, wide_hidden)
    naive = gradients(LOSSES[loss](whole(head, hidden, labels)), head, hidden)
    results = gradients(LOSSES[loss](ours(head, hidden, labels)), head, hidden)
    for name, a, b, t in zip(("loss", "hidden", "weight", "bias"), results, naive, exact, strict=True):
        assert a.dtype == b.dtype
        our_error, naive_error = (float((x.double() - t).norm()) for x in (a, b))
        assert our_error <= 2 * naive_error + half_ulp(t, dtype), f"{name}: {our_error:.2e} and {naive_error:.2e}"


@pytest.mark.parametrize(
    ("trains_head", "loss", "passes"), [(True, summed, 1), (True, weighted, 2), (False, weighted, 1)]
)
def test_logits_are_made_of_tokens_with_a_label_no_more_often_than_needed(
    trains_head: bool, loss: Any, passes: int
) -> None:
    head, hidden, labels = data(n_tokens=100)
    head.requires_grad_(trains_head)
    seen: list[int] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape[0] * x.shape[1])
            return super().forward(x)

    spy, last_use = Spy(WIDTH, VOCAB, dtype=torch.float64), LastUse()
    spy.load_state_dict(head.state_dict())
    spy.requires_grad_(trains_head)
    for _ in range(2):
        seen.clear()
        loss(ours(spy, hidden, labels, 32, last_use=last_use)).backward()
    assert max(seen) <= 32 and sum(seen) == passes * int((shifted(labels) != -100).sum())


def test_a_second_backward_gives_the_same() -> None:
    head, hidden, labels = data()
    loss = summed(ours(head, hidden, labels))
    wanted = [hidden, *head.parameters()]
    first, second = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    assert all(relative_error(b, a) < 1e-14 for a, b in zip(first, second, strict=True))


def test_without_a_label_there_are_zeros_that_reach_every_weight() -> None:
    head, hidden, labels = data()
    found = ours(head, hidden, torch.full_like(labels, -100))
    found.log_probs.sum().backward()
    assert not found.log_probs.any() and not found.label_mask.any() and found.is_top1 is not None
    assert all(t.grad is not None and not t.grad.any() for t in (hidden, *head.parameters()))


def test_what_changes_before_backward_is_refused() -> None:
    head, hidden, labels = data()
    dropped = nn.Sequential(nn.Dropout(0.5), head)
    loss = weighted(ours(dropped, hidden, labels, modules=[dropped]))
    dropped.eval()
    with pytest.raises(RuntimeError, match="training mode of the head changed"):
        loss.backward()
    loss = weighted(ours(head, hidden, labels))
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dropout_in_the_head_is_the_same_in_both_passes() -> None:
    head, hidden, labels = data()
    dropped, last_use = nn.Sequential(nn.Dropout(0.5), head), LastUse(summed=False)
    found = []
    for use in (last_use, LastUse()):
        torch.manual_seed(0)
        loss = summed(ours(dropped, hidden, labels, last_use=use))
        torch.rand(1)
        found.append(gradients(loss, dropped, hidden))  # type: ignore[arg-type]
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(*found, strict=True))
