"""Ten steps of TRL's trainers where ranks share sequences, against TRL alone on one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("trl")  # a machine with a GPU may have none; what it runs is not in here
import trl

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.training import groups, trainer
from hf_fpdt.training.trainer import FPDTTrainerMixin
from tests.helpers.support import assert_rejects, spawn
from tests.helpers.trl_steps import (
    Trained,
    assert_same,
    judged,
    preferences,
    prompts,
    texts,
    trained,
    variety,
    write_checkpoints,
)
from tests.parallel.test_whole_rows import (
    changed,
    counted_by_each_rank,
    counted_once,
    lost_temperature,
    out_of_order,
    shifted_mask,
)

PLUGIN = FPDTPlugin(sp_size=2, chunk_tokens=32, loss_chunk_tokens=24)


@dataclass(frozen=True)
class Run:
    """A family's ten steps of a case.

    Attributes:
        alone: what makes one process's batch that of all processes.
    """

    family: str
    case: str
    alone: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.case}"


# Each family once, and what is most apart between ranks.
TWO = (
    *(Run("llama", case) for case in ("SFT accumulated", "SFT packed", "GRPO accumulated", "RLOO LoRA")),
    Run("qwen3_moe", "SFT"),  # with its auxiliary loss, TRL's default
    *(Run("gemma2", "DPO LoRA"), Run("gpt_neox", "KTO"), Run("qwen3_5_text", "GRPO")),
)
TWICE, ALL = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 8}
# Not Qwen3-MoE: its auxiliary loss is a product of sums over a batch, so that of all groups is another, as under DDP.
FOUR = (
    *(Run("llama", case, TWICE) for case in ("SFT padding free", "KTO apo")),
    *(Run("gpt_neox", "DPO padding free", TWICE), Run("gemma2", "SFT", TWICE), Run("qwen3_5_text", "SFT", TWICE)),
    *(Run("gemma2", "GRPO written", ALL), Run("llama", "RLOO written", ALL)),
)


def _train(rank: int, world: int, checkpoints: Path, folder: Path, runs: tuple[Run, ...]) -> None:
    for run in runs:
        found = trained(run.case, checkpoints / run.family, folder / str(rank), fpdt=True, plugin=PLUGIN)
        logs: list[Any] = [None] * world
        dist.all_gather_object(logs, found[0])
        assert all(each == logs[0] for each in logs), f"{run.name}: ranks log different numbers"
        if rank == 0:
            torch.save(found, folder / f"{run.name}.pt")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("models"))


def compared(runs: tuple[Run, ...], processes: int, checkpoints: Path, folder: Path) -> None:
    spawn(_train, processes, checkpoints, folder, runs)
    for run in runs:
        truth = trained(run.case, checkpoints / run.family, folder, fpdt=False, **run.alone)
        found: Trained = torch.load(folder / f"{run.name}.pt", weights_only=False)
        try:
            assert_same(found, truth, padding=not run.alone)
        except AssertionError as error:
            raise AssertionError(f"{run.name}: {error}") from error


def test_two_ranks_train_as_one_process(checkpoints: Path, tmp_path: Path) -> None:
    compared(TWO, 2, checkpoints, tmp_path)


def test_two_groups_of_two_train_as_one_process(checkpoints: Path, tmp_path: Path) -> None:
    compared(FOUR, 4, checkpoints, tmp_path)


@contextmanager
def generated_for_every_rank() -> Iterator[None]:
    """Batches of a generation as TRL's configuration has them, of all ranks."""

    def count(accelerator: Any, group: Any, args: Any) -> None:
        right(accelerator, group, object())

    right = groups.count_groups
    with changed(trainer, "count_groups", count):
        yield


@contextmanager
def copies_counted() -> Iterator[None]:
    """Of all that is gathered a group's is there once for each of its ranks."""
    with (
        changed(groups, "groups_count", lambda ranks: nullcontext()),
        changed(trainer, "groups_count", lambda ranks: nullcontext()),
    ):
        yield


BUGS = (
    *(out_of_order, counted_once, counted_by_each_rank, shifted_mask, lost_temperature),
    *(copies_counted, generated_for_every_rank),
)


def _broken(rank: int, world: int, checkpoint: Path, folder: Path, truth: Trained) -> None:
    def steps(bug: Any = nullcontext) -> Trained:
        with bug():
            own = folder / str(rank)
            return trained("GRPO accumulated", checkpoint, own, fpdt=True, plugin=PLUGIN, max_steps=3)

    assert_same(steps(), truth)
    assert_rejects(lambda bug: assert_same(steps(bug), truth), {bug.__name__: bug for bug in BUGS})
    with (
        changed(trainer, "generation_shared", lambda *_: nullcontext()),
        changed(trainer, "share_random_state", lambda _: None),
        pytest.raises(ValueError, match="different samples"),
    ):
        steps()


def test_what_is_wrong_between_ranks_shows(checkpoints: Path, tmp_path: Path) -> None:
    truth = trained("GRPO accumulated", checkpoints / "llama", tmp_path, fpdt=False, max_steps=3)
    spawn(_broken, 2, checkpoints / "llama", tmp_path, truth)


def _resumed(rank: int, world: int, checkpoint: Path, folder: Path) -> None:
    """Six steps, and the last two of them again from a checkpoint: adapters with dropout, Adam, evaluation."""
    args = trl.SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        learning_rate=0.003,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )

    def trained_sft(resume: bool) -> tuple[list[tuple[int, float]], dict[str, torch.Tensor]]:
        made = Sft(
            model=str(checkpoint),
            args=args,
            train_dataset=texts(),
            eval_dataset=texts().select(range(3)),
            peft_config=LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.2),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            fpdt_plugin=PLUGIN,
        )
        made.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
        rows = [row for row in made.state.log_history if row["step"] > 4]
        losses = [(row["step"], row[name]) for row in rows for name in ("loss", "eval_loss") if name in row]
        # TRL's step would make logits too, of whole rows; where ranks share them there is the loss alone.
        predicted = made.predict(made.eval_dataset)
        assert predicted.predictions is None and (6, predicted.metrics["test_loss"]) in losses
        return losses, get_peft_model_state_dict(made.model)

    (losses, weights), (again, found) = trained_sft(resume=False), trained_sft(resume=True)
    assert len(losses) == 3 and again == losses
    assert all(torch.equal(weight, found[name]) for name, weight in weights.items())
    saved = [load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6)]
    assert all(torch.equal(weight, saved[1][name]) for name, weight in weights.items())
    assert not any(torch.equal(weight, saved[0][name]) for name, weight in weights.items() if "lora_B" in name)


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(checkpoints: Path, tmp_path: Path) -> None:
    spawn(_resumed, 2, checkpoints / "llama", tmp_path)


class Reward(FPDTTrainerMixin, trl.RewardTrainer):
    """Makes its loss of scores."""


class Sft(FPDTTrainerMixin, trl.SFTTrainer):
    """Given a model that FPDT was applied to already, or rows that are cut already."""


class Dpo(FPDTTrainerMixin, trl.DPOTrainer):
    """Given sets for evaluation that do not divide."""


class Kto(FPDTTrainerMixin, trl.KTOTrainer):
    """Likewise."""


class Grpo(FPDTTrainerMixin, trl.GRPOTrainer):
    """Given a generation that is shared by all ranks."""


def _refused(rank: int, world: int, checkpoint: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    common: dict[str, Any] = {"processing_class": tokenizer, "fpdt_plugin": PLUGIN}
    often: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
    scored = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    with pytest.raises(NotImplementedError, match="does not make its loss of the log-prob|no language model's"):
        args = trl.RewardConfig(str(folder), **often)
        Reward(model=scored, args=args, train_dataset=preferences(), **common)
    args = trl.SFTConfig(str(folder), **often)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    apply_fpdt(model, PLUGIN)
    with pytest.raises(NotImplementedError, match="FPDT already, and TRL's forward around it"):
        Sft(model=model, args=args, train_dataset=texts(), **common)
    args = trl.GRPOConfig(str(folder), per_device_train_batch_size=3, num_generations=2, **often)
    with pytest.raises(ValueError, match="3 samples at a time, which 2 completions of a prompt do not divide"):
        Grpo(model=str(checkpoint), args=args, train_dataset=prompts(), reward_funcs=variety, **common)
    often |= {"eval_strategy": "steps", "per_device_eval_batch_size": 2}
    kinds: tuple[tuple[Any, Any, Any], ...] = (Dpo, trl.DPOConfig, preferences()), (Kto, trl.KTOConfig, judged())
    for kind, config, data in kinds:
        few = {"args": config(str(folder), **often), "eval_dataset": data.select(range(3))}
        given = {**common, **few, "model": str(checkpoint), "train_dataset": data}
        with pytest.raises(NotImplementedError, match="3 samples of eval_dataset do not divide .* on 2 ranks"):
            kind(**{**given, "fpdt_plugin": FPDTPlugin(chunk_tokens=32)})
        made = kind(**given)  # one group of two takes the last one as it is
        # What TRL's callbacks share out between processes and gather of them is whole, where a group is one.
        with made.accelerator.split_between_processes(["a", "b", "c"]) as shared, groups.groups_count(2):
            assert gather_object(shared) == ["a", "b", "c"]


def test_what_cannot_be_right_is_refused_when_the_trainer_is_made(checkpoints: Path, tmp_path: Path) -> None:
    spawn(_refused, 2, checkpoints / "llama", tmp_path)
