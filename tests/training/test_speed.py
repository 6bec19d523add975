"""Training logs tell how fast it goes: of the tokens that were trained on, in the seconds that training took.

Of several processes: `test_launch.py`.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_fpdt import FPDTPlugin, FPDTTrainer, FPDTTrainerMixin, apply_fpdt
from hf_fpdt.model import applied_settings
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.plan.model_sizes import ModelSizes
from hf_fpdt.plan.operations import strict_flops
from hf_fpdt.training.speed import TrainingSpeed
from tests.helpers.models import tiny
from tests.training.test_fpdt_trainer import STEPS, trainer
from tests.training.test_trainer import PadRight

KEYS = ("step_seconds", "tokens_per_second", "host_gib")
BATCH = 2
HOUR = 3600.0


class CountTokens(PadRight):
    """Remembers the size of every batch; without workers and for one process they come in the order of training."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []
        self.lengths: list[list[int]] = []  # without padding, which is not computed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        self.shapes.append((batch["input_ids"].shape[0], batch["input_ids"].shape[1]))
        self.lengths.append(batch["attention_mask"].sum(1).tolist())
        return batch


class Seen(TrainerCallback):
    """What report_to's callbacks get."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Clock:
    """The real one, which a test may put forward."""

    ahead = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("hf_fpdt.training.speed.time", clock := Clock())
    return clock


def trained(folder: Path, kind: Any = FPDTTrainer, **changes: Any) -> tuple[Any, list[dict[str, float]], CountTokens]:
    """A trainer after training, the logs of its steps, and its collator."""
    collator = CountTokens()
    run = trainer(folder, kind, changes=changes, data_collator=collator)
    run.train()
    return run, [entry for entry in run.state.log_history if "loss" in entry], collator


def tokens_of(logs: list[dict[str, float]], steps: int = 1) -> list[int]:
    return [round(log["tokens_per_second"] * log["step_seconds"] * steps) for log in logs]


def sizes(shapes: list[tuple[int, int]]) -> list[int]:
    return [rows * length for rows, length in shapes]


def real(collator: CountTokens) -> list[int]:
    """Tokens of each batch without padding."""
    return [sum(lengths) for lengths in collator.lengths]


def test_tokens_a_second_times_seconds_are_the_tokens(tmp_path: Path) -> None:
    began = time.perf_counter()
    _, logs, collator = trained(tmp_path)
    seconds = time.perf_counter() - began
    assert len(logs) == STEPS and all(log.keys() >= set(KEYS) for log in logs)
    assert tokens_of(logs) == real(collator)[:STEPS] != sizes(collator.shapes)[:STEPS]
    assert 0 < sum(log["step_seconds"] for log in logs) < seconds
    assert "device_peak_gib" not in logs[0] and "strict_mfu" not in logs[0], "there is no GPU"
    assert logs[0]["host_gib"] >= 0


def test_accumulated_batches_count_to_their_step(tmp_path: Path) -> None:
    _, logs, collator = trained(tmp_path, gradient_accumulation_steps=3, logging_steps=2)
    assert len(logs) == STEPS // 2
    counted = real(collator)[: 3 * STEPS]
    assert tokens_of(logs, steps=2) == [sum(counted[:6]), sum(counted[6:12])]


def test_evaluation_is_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    whole = FPDTTrainerMixin.evaluation_loop

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.ahead += HOUR
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(FPDTTrainerMixin, "evaluation_loop", slow)
    run, logs, collator = trained(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=2)
    evaluations = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == STEPS and len(logs) == STEPS // 2
    assert all(log["step_seconds"] < HOUR / 2 for log in logs)
    assert not any(key in evaluation for evaluation in evaluations for key in KEYS)
    # Evaluation's batches of three rows pass the same collator, and do not count.
    training = [sum(lengths) for lengths in collator.lengths if len(lengths) == BATCH]
    assert tokens_of(logs, steps=2) == [sum(training[:2]), sum(training[2:4])]


class Mine(FPDTTrainerMixin, Trainer):
    """A user's own trainer."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "mine": 1.0}, *args, **kwargs)


def test_callbacks_get_them_from_a_trainer_of_ones_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, Mine, callbacks=[seen := Seen()])
    run.train()
    steps = [log for log in seen.logs if "loss" in log]
    assert len(steps) == STEPS and all(log.keys() >= {*KEYS, "mine", "loss", "epoch"} for log in steps)
    again = len(run.state.log_history)
    run.evaluate()
    run.log({"loss": 1.0})  # a user's own: other processes may not be there to be asked
    assert not any(key in entry for entry in run.state.log_history[again:] for key in KEYS)


def test_they_stand_beside_transformers_own_count(tmp_path: Path) -> None:
    _, logs, collator = trained(tmp_path, include_num_input_tokens_seen="all")
    seen = 0
    for log, padded, tokens in zip(logs, sizes(collator.shapes), real(collator), strict=False):
        seen += padded
        assert log["num_input_tokens_seen"] == seen and log["train_tokens_per_second"] > 0
        assert tokens_of([log]) == [tokens]


def test_a_second_training_starts_its_own_clock(tmp_path: Path, clock: Clock) -> None:
    run, _, _ = trained(tmp_path)
    clock.ahead += HOUR
    run.train()
    second = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(second) == STEPS and sum(log["step_seconds"] for log in second) < HOUR


def test_strict_mfu_is_the_models_operations_over_what_the_gpu_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 1e9
    monkeypatch.setattr("hf_fpdt.training.speed.device_peak", lambda: peak)
    run, logs, collator = trained(tmp_path)
    model = run.model
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    sizes_of_model = ModelSizes.of(model.config, layers=2, layer_parameters=layer)
    for log, lengths in zip(logs, collator.lengths, strict=False):
        vocabulary = model.config.vocab_size
        operations = sum(strict_flops(sizes_of_model, vocabulary, length, full=True) for length in lengths)
        assert log["strict_mfu"] * log["step_seconds"] * peak == pytest.approx(operations)


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        ([{"input_ids": [3, 4, 5]}, {"input_ids": torch.arange(7)}], 10),
        ([{"prompt": "what is trained on is generated later"}], 0),
        ([torch.zeros(1, 5)], 0),
        ({"prompt_ids": torch.zeros(1, 5)}, 0),
    ],
)
def test_what_a_trainer_hands_out_counts_as_far_as_it_says(inputs: Any, tokens: int) -> None:
    here = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: own)
    speed, model = TrainingSpeed(here), tiny()
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    model(input_ids=torch.full((1, 20), 3))  # host memory is there
    speed.begin(model, 0)
    speed.count(inputs)
    log = speed.log(1)
    assert log["step_seconds"] > 0 and log.get("tokens_per_second", 0) * log["step_seconds"] == pytest.approx(tokens)
    assert ("tokens_per_second" in log) == bool(tokens)
    handle.remove()


@pytest.mark.parametrize(("whole_rows", "tokens"), [(False, 10), (True, 5)])
def test_ranks_that_share_rows_count_their_part_of_them(
    whole_rows: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is a rank's part already, or all of it on every rank."""
    peak = 1e9
    monkeypatch.setattr("hf_fpdt.training.speed.device_peak", lambda: peak)
    here = SimpleNamespace(device=torch.device("cpu"), gather=None, gather_of_ranks=lambda own: own)
    speed, model = TrainingSpeed(here, whole_rows=whole_rows), tiny()
    handle, settings = apply_fpdt(model, FPDTPlugin(chunk_tokens=16)), applied_settings(model)
    assert settings is not None
    model(input_ids=torch.full((1, 20), 3))  # host memory is there
    settings.group = SequenceParallelGroup(size=2)
    speed.begin(model, 0)
    speed.count({"input_ids": torch.zeros(1, 10, dtype=torch.long)})
    log = speed.log(1)
    assert log["tokens_per_second"] * log["step_seconds"] == pytest.approx(tokens)
    whole = strict_flops(settings.sizes, model.config.vocab_size, 2 * tokens, full=True)
    assert log["strict_mfu"] * log["step_seconds"] * peak == pytest.approx(whole / 2)
    handle.remove()


def test_a_model_without_fpdt_is_left_alone() -> None:
    speed: Any = TrainingSpeed(SimpleNamespace(device=torch.device("cpu")))
    assert speed.log(1) == {}
    speed.begin(tiny(), 0)
    speed.count({"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert speed.log(1) == {}


def test_a_packed_row_counts_its_tokens_and_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, lengths = 1e9, (7, 20, 13)
    monkeypatch.setattr("hf_fpdt.training.speed.device_peak", lambda: peak)
    here = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: own)
    speed, model = TrainingSpeed(here), tiny()
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    ids = torch.full((1, 40), 3)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    mask = (torch.arange(20) < torch.tensor([[7], [20], [13]])).long()
    packed: list[tuple[dict[str, torch.Tensor], tuple[int, ...]]] = [
        ({"input_ids": ids, "position_ids": places}, lengths),
        ({"input_ids": ids}, (40,)),
        ({"input_ids": torch.full((3, 20), 3), "attention_mask": mask}, lengths),
    ]
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    sizes_of_model = ModelSizes.of(model.config, layers=2, layer_parameters=layer)
    for inputs, documents in packed:
        speed.begin(model, 0)
        labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(1)) == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        speed.count(inputs)
        log = speed.log(1)
        assert log["tokens_per_second"] * log["step_seconds"] == pytest.approx(40)
        # Each document by itself makes the operations of the row.
        each = [strict_flops(sizes_of_model, model.config.vocab_size, length, full=True) for length in documents]
        assert log["strict_mfu"] * log["step_seconds"] * peak == pytest.approx(sum(each))
    handle.remove()
