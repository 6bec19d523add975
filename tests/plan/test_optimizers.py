"""What an optimizer is predicted to keep is what it keeps, and "auto" leaves that to it and no more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import Trainer
from transformers.optimization import Adafactor

from hf_fpdt import FPDTAccelerator, FPDTPlugin, FPDTTrainer, apply_fpdt
from hf_fpdt.memory.available import TrainingMemory, kind_of
from hf_fpdt.model.apply import applied_settings, train_with
from hf_fpdt.plan.optimizers import OPTIMIZERS, state_bytes
from tests.helpers.models import tiny
from tests.helpers.support import assert_rejects
from tests.training.test_fpdt_trainer import trainer

REAL: dict[str, Any] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, fused=True),
    "adafactor": torch.optim.Adafactor,
    "sgd-momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
}


def kept_bytes(optimizer: Any) -> int:
    """Of the states that an optimizer has."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_optimizer_keeps_what_is_predicted(kind: str, dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.randn(512, 512, dtype=dtype)) for _ in range(2)]
    optimizer = REAL[kind](weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    assert kind_of(optimizer) == kind
    optimizer.step()
    size = sum(weight.numel() for weight in weights) * dtype.itemsize

    def check(told: int) -> None:
        assert abs(kept_bytes(optimizer) - told) < 0.02 * size

    told = state_bytes(kind, 2 * 512 * 512, dtype.itemsize)
    check(told)
    assert_rejects(check, {"a state more": told + size, "of the other size": told * 3 // 2 + size // 4})


def named(name: str, **attributes: Any) -> Any:
    """An optimizer of a package that is not here, by its class's name."""
    return type(name, (), attributes)()


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (named("AdamW8bit"), "adamw-8bit"),
        (named("PagedAdamW8bit"), "adamw-8bit"),
        (named("AdamW", args=named("Args", optim_bits=8)), "adamw-8bit"),
        (named("AdamW", args=named("Args", optim_bits=32)), "adamw"),
        (named("Lion"), "lion"),
        (named("Lion8bit"), "adamw"),
        (named("NobodyKnows"), "adamw"),
        (Adafactor([nn.Parameter(torch.ones(2, 2))]), "adafactor"),
        (named("AcceleratedOptimizer", optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1)), "sgd"),
    ],
)
def test_kinds_are_told_by_name_and_the_unknown_one_is_the_largest(optimizer: Any, kind: str) -> None:
    assert kind_of(optimizer) == kind and kind in OPTIMIZERS
    assert state_bytes(kind, 100, 2) <= state_bytes("adamw", 100, 2) == 400


def leaves(model: nn.Module) -> int:
    """What "auto" leaves to the training of a model."""
    settings = applied_settings(model)
    assert settings is not None and isinstance(settings.store._tiers.training, TrainingMemory)
    return settings.store._tiers.training()


def test_what_is_there_already_is_not_left_once_more() -> None:
    model = tiny(dtype=torch.float32)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=8))
    trained = sum(p.numel() for p in model.parameters()) * 4
    weights = list(model.parameters())
    sums = leaves(model) - 3 * trained
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sums == 6 * max(layer, trained // 4 - 2 * layer)
    optimizer = torch.optim.AdamW(weights)
    train_with(model, optimizer)
    assert leaves(model) == 3 * trained + sums
    ids = torch.randint(0, 80, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert leaves(model) == 2 * trained + sums
    optimizer.step()
    assert leaves(model) == sums, "states that were loaded, or made by the first step"
    optimizer.zero_grad()
    assert leaves(model) == trained + sums
    copied = copy.deepcopy(model)
    assert leaves(copied) == 3 * trained + sums, "a copy's weights have no states"
    del optimizer
    assert leaves(model) == 3 * trained + sums


@pytest.mark.parametrize(("name", "kind"), [("sgd", "sgd"), ("adafactor", "adafactor"), ("adamw_torch", "adamw")])
def test_the_trainer_leaves_what_its_optimizer_takes(name: str, kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, FPDTTrainer, changes={"optim": name})
    default = leaves(run.model)
    run.create_optimizer()
    trained = sum(p.numel() for p in run.model.parameters())
    assert default - leaves(run.model) == state_bytes("adamw", trained, 4) - state_bytes(kind, trained, 4)
    assert isinstance(run, Trainer) and run.optimizer is not None


def test_prepare_leaves_to_each_model_what_its_own_optimizer_takes() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    runner = FPDTAccelerator(cpu=True, fpdt_plugin=FPDTPlugin(chunk_tokens=8))
    one, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    plain, moving = torch.optim.SGD(one.parameters(), lr=1), torch.optim.SGD(other.parameters(), lr=1, momentum=0.9)
    prepared = runner.prepare(one, other, plain, moving)
    trained = sum(p.numel() for p in one.parameters()) * 4
    assert leaves(other) - leaves(one) == trained and len(prepared) == 4


def test_a_model_without_fpdt_is_left_alone() -> None:
    model = tiny()
    train_with(model, torch.optim.SGD(model.parameters(), lr=1))
    assert applied_settings(model) is None
