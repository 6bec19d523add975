"""FPDTTrainer on one process: what it refuses, and that it trains and evaluates as the stock Trainer does."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.utils import logging as of_transformers

from hf_fpdt import FPDTPlugin, FPDTTrainer, FPDTTrainerMixin, ShardingCollator, apply_fpdt
from hf_fpdt.model.apply import applied_settings
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.training.refused import refused_options
from hf_fpdt.training.trainer import _pad_token_id
from tests.helpers.models import tiny
from tests.helpers.support import assert_rejects
from tests.training.test_trainer import PadRight, text_rows

PLUGIN = FPDTPlugin(chunk_tokens=16, loss_chunk_tokens=24)
TOLERANCE = 1e-6
STEPS = 4


def model(**config: Any) -> nn.Module:
    return tiny(dtype=torch.float32, vocab_size=260, **config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **changes,
    }
    return TrainingArguments(**chosen)


def trainer(folder: Path, kind: Any = FPDTTrainer, *, changes: dict[str, Any] | None = None, **more: Any) -> Any:
    """A trainer of class `kind`, with FPDT by the mixin or, for the stock one, none; `changes` to its arguments."""
    if issubclass(kind, FPDTTrainerMixin):
        more = {"fpdt_plugin": PLUGIN, **more}
    if "model_init" not in more:
        more = {"model": model(), **more}
    chosen: dict[str, Any] = {
        "train_dataset": text_rows(24),
        "eval_dataset": text_rows(13, start=4000),
        "data_collator": PadRight(),
        **more,
    }
    return kind(args=arguments(folder, **(changes or {})), **chosen)


def training(run: Any) -> list[float]:
    """Losses and gradient norms as logged, and a sum over the weights."""
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    weights = sum(parameter.detach().double().abs().sum().item() for parameter in run.model.parameters())
    return [entry[name] for entry in logs for name in ("loss", "grad_norm")] + [weights]


def assert_close(ours: list[float], truth: list[float], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(truth)
    for index, (mine, other) in enumerate(zip(ours, truth, strict=True)):
        assert abs(mine - other) <= tolerance * abs(other), f"{index}: {mine}, not {other}"


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_every_option_that_cannot_be_honoured_is_named_at_once(tmp_path: Path) -> None:
    changes = {"label_smoothing_factor": 0.1, "average_tokens_across_devices": False}
    with pytest.raises(NotImplementedError) as refusal:
        trainer(
            tmp_path,
            changes=changes,
            compute_metrics=lambda prediction: {},
            compute_loss_func=lambda *args, **kwargs: None,
        )
    for name in (*changes, "compute_metrics", "compute_loss_func"):
        assert name in str(refusal.value)


def test_compiling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments write there; taken back after the test
    with pytest.raises(NotImplementedError, match="torch_compile"):
        trainer(tmp_path, changes={"torch_compile": True, "torch_compile_backend": "eager"})


def options(**changes: Any) -> SimpleNamespace:
    """What `refused_options` reads of a trainer; nothing is refused without `changes`."""
    args: dict[str, Any] = {
        "label_smoothing_factor": 0.0,
        "use_liger_kernel": False,
        "liger_kernel_config": None,
        "average_tokens_across_devices": True,
        "train_sampling_strategy": "random",
        "neftune_noise_alpha": None,
        "n_gpu": 1,
        "per_device_train_batch_size": 1,
    }
    own = {
        name: changes.pop(name, None) for name in ("compute_metrics", "compute_loss_func", "model", "data_collator")
    }
    return SimpleNamespace(args=SimpleNamespace(**(args | changes)), **own)


LEFT = SimpleNamespace(tokenizer=SimpleNamespace(padding_side="left"), pad_to_multiple_of=None)
LEFT_BY_EIGHT = SimpleNamespace(tokenizer=SimpleNamespace(padding_side="left"), pad_to_multiple_of=8)
RIGHT = SimpleNamespace(tokenizer=SimpleNamespace(padding_side="right"), pad_to_multiple_of=8)
CLASSIFIER = SimpleNamespace(get_output_embeddings=lambda: None)


@pytest.mark.parametrize(
    ("changes", "sp_size", "message"),
    [
        ({"use_liger_kernel": True}, 1, "Liger's fused loss.*'fused_linear_cross_entropy': False"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"rope": True}}, 1, "Liger"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}, 1, None),
        ({"n_gpu": 2}, 1, "DataParallel.*accelerate launch"),
        ({"train_sampling_strategy": "batch_rebalance"}, 2, "batch_rebalance"),
        ({"train_sampling_strategy": "batch_rebalance"}, 1, None),
        ({"neftune_noise_alpha": 5.0}, 2, "neftune_noise_alpha"),
        ({"neftune_noise_alpha": 5.0}, 1, None),
        ({"compute_metrics": print}, 1, "compute_metrics needs whole logits.*eval_loss.*in slices"),
        ({"label_smoothing_factor": 0.1}, 1, "whole logits.*: set it to 0; .*transformers' Trainer .*apply_fpdt"),
        ({"compute_loss_func": print}, 1, "whole logits.*: leave it out; .*transformers' Trainer .*apply_fpdt"),
        ({"compute_metrics": print, "predict_with_generate": True}, 1, None),
        ({"compute_metrics": print, "model": CLASSIFIER}, 1, None),
        ({"data_collator": LEFT, "per_device_train_batch_size": 2}, 1, 'left.*tokenizer.padding_side = "right"'),
        ({"data_collator": LEFT_BY_EIGHT}, 1, "pads on the left"),
        ({"data_collator": LEFT}, 1, None),
        ({"data_collator": RIGHT, "per_device_train_batch_size": 2}, 1, None),
        ({"data_collator": DataCollatorWithFlattening()}, 1, None),
        ({}, 4, None),
    ],
)
def test_single_options_are_refused_where_they_would_be_wrong(
    changes: dict[str, Any], sp_size: int, message: str | None
) -> None:
    reasons = "; ".join(refused_options(options(**changes), sp_size))
    if message is None:
        assert not reasons
    else:
        pytest.raises(NotImplementedError, _raise, reasons).match(message)


def _raise(reasons: str) -> None:
    if reasons:
        raise NotImplementedError(reasons)


def test_what_is_done_is_said_unless_the_trainer_is_to_be_quiet(tmp_path: Path) -> None:
    ours, transformers_level = logging.getLogger("hf_fpdt"), of_transformers.get_verbosity()
    before = ours.level
    try:
        for log_level, said in (("error", False), ("passive", True)):
            ours.setLevel(logging.NOTSET)
            of_transformers.set_verbosity_warning()
            trainer(tmp_path, changes={"log_level": log_level})
            assert ours.isEnabledFor(logging.INFO) == said
    finally:
        ours.setLevel(before)
        of_transformers.set_verbosity(transformers_level)


def test_a_model_with_fpdt_of_other_settings_is_refused(tmp_path: Path) -> None:
    prepared = model()
    apply_fpdt(prepared, FPDTPlugin(chunk_tokens=32))
    with pytest.raises(ValueError, match="chunk_tokens=32.*pass the same fpdt_plugin"):
        trainer(tmp_path, model=prepared)
    same = model()
    apply_fpdt(same, PLUGIN)
    assert trainer(tmp_path, model=same).model is same


def test_a_collator_that_cuts_in_another_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass the inner collator"):
        trainer(tmp_path, data_collator=ShardingCollator(PadRight(), 2, 0, 16))


def test_more_ranks_than_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="sp_size=2 needs 2 processes.*accelerate launch"):
        trainer(tmp_path, fpdt_plugin=FPDTPlugin(sp_size=2, chunk_tokens=16))


@pytest.mark.parametrize("pad, expected", [(None, 0), (-1, 0), (5, 5), (260, 0)])
def test_sequences_are_filled_with_a_token_that_the_model_knows(pad: int | None, expected: int) -> None:
    """Some configurations say -1; a pad token may be added to a tokenizer without the model's knowing."""
    padded = model()
    for processing, configured in ((None, pad), (SimpleNamespace(pad_token_id=pad), None)):
        padded.config.pad_token_id = configured  # type: ignore[union-attr]
        assert _pad_token_id(SimpleNamespace(processing_class=processing, model=padded)) == expected


# -- training ---------------------------------------------------------------------------------------------------------


class Plain(FPDTTrainerMixin, Trainer):
    """The mixin over a Trainer subclass of a user."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"num_train_epochs": 1, "max_steps": -1}], ids=str
)
def test_it_trains_as_the_stock_trainer(changes: dict[str, Any], tmp_path: Path) -> None:
    truth = training(trainer(tmp_path, Trainer, changes=changes))
    prepared = model()
    apply_fpdt(prepared, PLUGIN)
    assert_close(training(trainer(tmp_path, Trainer, changes=changes, model=prepared)), truth)
    assert_close(training(trainer(tmp_path, changes=changes)), truth)
    mixed = trainer(tmp_path, Plain, changes=changes)
    assert_close(training(mixed), truth)
    assert mixed.calls >= STEPS and applied_settings(mixed.model)
    broken = {"other seed": training(trainer(tmp_path, changes={**changes, "seed": 1}))}
    broken["more filling"] = [value * 1.01 for value in truth]
    assert_rejects(lambda values: assert_close(values, truth), broken)


def test_each_model_of_model_init_gets_fpdt(tmp_path: Path) -> None:
    made = []

    def model_init() -> nn.Module:
        made.append(model())
        return made[-1]

    run = trainer(tmp_path, model_init=model_init)
    losses = training(run)
    assert len(made) == 2 and all(map(applied_settings, made)) and run.model is made[-1]
    assert_close(losses, training(trainer(tmp_path, Trainer)))
    assert run.fpdt_handle.model is run.model


class Windows(Dataset):
    """The rows of `text_rows` as a plain torch data set."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.rows = text_rows(count, start).to_list()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.rows = Windows(count, start).rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize("kind", [Windows, Stream, "streamed"])
def test_other_kinds_of_data_sets_train_and_evaluate_as_in_the_stock_trainer(kind: Any, tmp_path: Path) -> None:
    def sets() -> dict[str, Any]:
        if kind == "streamed":
            return {"train_dataset": text_rows(24).to_iterable_dataset(), "eval_dataset": Windows(7, 4000)}
        return {"train_dataset": kind(24), "eval_dataset": kind(7, 4000)}

    ours, theirs = trainer(tmp_path, **sets()), trainer(tmp_path, Trainer, **sets())
    assert_close(training(ours), training(theirs))
    assert_close([ours.evaluate()["eval_loss"]], [theirs.evaluate()["eval_loss"]])
    assert ours.data_collator.columns == theirs.data_collator.columns == {"input_ids", "labels"}


def test_unused_columns_are_kept_if_asked_for(tmp_path: Path) -> None:
    run = trainer(tmp_path, changes={"remove_unused_columns": False, "max_steps": 1})
    run.train()
    assert run.data_collator.columns == {"input_ids", "labels", "where"}


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 13, 20])
@pytest.mark.parametrize("rows", [1, 13])
def test_sets_that_do_not_divide_give_the_stock_loss(batch_size: int, rows: int, tmp_path: Path) -> None:
    changes = {"per_device_eval_batch_size": batch_size}
    data = text_rows(rows, start=4000)
    ours, theirs = (trainer(tmp_path, kind, changes=changes).evaluate(data) for kind in (FPDTTrainer, Trainer))
    assert ours.keys() == theirs.keys()
    assert_close([ours["eval_loss"]], [theirs["eval_loss"]])
    shorter = trainer(tmp_path, changes=changes).evaluate(data.select(range(max(rows - 1, 1))))
    if rows > 1:
        assert_rejects(lambda loss: assert_close([loss], [theirs["eval_loss"]]), {"a row lost": shorter["eval_loss"]})


def test_a_dictionary_of_sets_is_evaluated_by_name(tmp_path: Path) -> None:
    sets = {"one": text_rows(5, 4000), "two": Windows(7, 5000)}
    ours, theirs = (trainer(tmp_path, kind, eval_dataset=sets).evaluate() for kind in (FPDTTrainer, Trainer))
    for name in ("eval_one_loss", "eval_two_loss"):
        assert_close([ours[name]], [theirs[name]])
    assert ours["eval_one_loss"] != ours["eval_two_loss"]


def test_evaluation_during_training_changes_nothing(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluated = trainer(tmp_path, changes=changes)
    assert_close(training(evaluated), training(trainer(tmp_path)), 1e-12)
    assert len([entry for entry in evaluated.state.log_history if "eval_loss" in entry]) == STEPS + 1


def without_labels(rows: datasets.Dataset, indices: set[int]) -> datasets.Dataset:
    """Rows of which some have no label that counts."""
    return rows.map(
        lambda row, index: {"labels": [-100] * len(row["labels"]) if index in indices else row["labels"]},
        with_indices=True,
    )


def test_batches_without_a_label_are_left_out_of_the_mean(tmp_path: Path) -> None:
    changes = {"per_device_eval_batch_size": 1}
    data, rest = without_labels(text_rows(5, 4000), {1, 4}), text_rows(5, 4000).select([0, 2, 3])
    expected = trainer(tmp_path, Trainer, changes=changes).evaluate(rest)["eval_loss"]
    assert_close([trainer(tmp_path, changes=changes).evaluate(data)["eval_loss"]], [expected])
    nothing = trainer(tmp_path, changes=changes).evaluate(without_labels(text_rows(2), {0, 1}))
    assert math.isnan(nothing["eval_loss"])
    kept = trainer(tmp_path, changes={**changes, "logging_nan_inf_filter": False}).evaluate(data)
    assert math.isnan(kept["eval_loss"])


@pytest.mark.parametrize("concatenated", [True, False])
def test_predictions_without_labels_are_those_of_the_set(concatenated: bool, tmp_path: Path) -> None:
    """The set is filled up to whole batches; what was filled in does not come out."""
    same_length = datasets.Dataset.from_list([{"input_ids": [3 + i, 4, 5, 6 + i]} for i in range(7)])

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    changes = {"eval_do_concat_batches": concatenated}
    runs = [trainer(tmp_path, kind, changes=changes, data_collator=collate) for kind in (FPDTTrainer, Trainer)]
    ours, theirs = (run.predict(same_length).predictions for run in runs)
    if not concatenated:
        assert [len(batch) for batch in ours] == [len(batch) for batch in theirs] == [3, 3, 1]
        ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert ours.shape == theirs.shape == (7, 4, 260)
    assert np.abs(ours - theirs).max() < 1e-4


def test_predictions_with_labels_give_the_loss_and_the_labels_of_the_set(tmp_path: Path) -> None:
    data = text_rows(7, 4000)
    ours, theirs = (trainer(tmp_path, kind).predict(data) for kind in (FPDTTrainer, Trainer))
    assert_close([ours.metrics["test_loss"]], [theirs.metrics["test_loss"]])
    assert np.array_equal(ours.label_ids, theirs.label_ids)


# -- what is saved ----------------------------------------------------------------------------------------------------


def test_nothing_saved_holds_a_process_group(tmp_path: Path) -> None:
    run = trainer(tmp_path, changes={"save_strategy": "steps", "save_steps": 2})
    run.fpdt_group = SequenceParallelGroup(1, 0, object())  # which neither pickles nor copies
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.to_dict() == run.args.to_dict()
    assert not any("fpdt" in name for name in vars(saved))
