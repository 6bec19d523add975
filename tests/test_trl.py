"""TRL's trainers with the mixin train as without it: their own loss, of hidden states that FPDT makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.comms import SequenceParallelGroup
from hf_fpdt.trainer import FPDTTrainerMixin, _Evaluation
from tests.app_support import stories, write_tiny_checkpoint
from tests.support import assert_rejects

TOLERANCE = 1e-4  # of fp32 sums of a few hundred terms, twice


class FpdtSft(FPDTTrainerMixin, SFTTrainer):
    """As the README has it."""


class FpdtDpo(FPDTTrainerMixin, DPOTrainer):
    """The same for preferences: a policy, and a reference without gradients."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def texts() -> Dataset:
    return Dataset.from_list([{"text": text[:400]} for text in stories(4)])


def preferences() -> Dataset:
    rows = [(text[:150], text[150:350], text[500:600]) for text in stories(4)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


LORA = {"peft_config": LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)}
CASES: dict[str, tuple[Any, Any, Any, Callable[[], Dataset], dict[str, Any]]] = {
    "SFT": (SFTTrainer, FpdtSft, SFTConfig, texts, {}),
    "SFT, LoRA": (SFTTrainer, FpdtSft, SFTConfig, texts, LORA),
    "DPO": (DPOTrainer, FpdtDpo, DPOConfig, preferences, {}),
    "DPO, LoRA": (DPOTrainer, FpdtDpo, DPOConfig, preferences, LORA),
}


def logged(
    case: str, checkpoint: Path, folder: Path, *, fpdt: bool, change: Callable[[PreTrainedModel], None] | None = None
) -> list[float]:
    """Loss, gradient norm and TRL's own metrics of two steps and an evaluation."""
    stock, ours, config, data, more = CASES[case]
    rows = data()
    often = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    args = config(str(folder), **often, max_length=None, use_cpu=True, bf16=False, report_to="none")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="fpdt" if fpdt else "sdpa")
    if change is not None:
        change(model)
    extra = {**more, **({"fpdt_plugin": FPDTPlugin(chunk_tokens=64)} if fpdt else {})}
    trainer = (ours if fpdt else stock)(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        **extra,
    )
    trainer.train()
    trainer.evaluate()
    wanted = ("loss", "grad_norm", "entropy", "eval_loss", "eval_entropy", "logps/chosen", "num_tokens")
    return [row[name] for row in trainer.state.log_history for name in wanted if name in row]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_without_fpdt(case: str, checkpoint: Path, tmp_path: Path) -> None:
    truth = logged(case, checkpoint, tmp_path / "stock", fpdt=False)

    def assert_same(change: Callable[[PreTrainedModel], None] | None) -> None:
        found = logged(case, checkpoint, tmp_path / "ours", fpdt=True, change=change)
        assert found == pytest.approx(truth, rel=TOLERANCE)

    def scaled(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 1.5

    assert len(truth) >= 10
    assert_same(None)
    assert_rejects(assert_same, {"a scale": scaled})


def test_an_evaluation_that_would_count_filling_is_refused() -> None:
    """Ranks need whole batches; rows that fill them up are left out by their labels, which preferences do not have."""
    evaluation = _Evaluation(rows=6, rank=0, ranks=2, finite_only=True)
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "completion_mask": torch.ones(2, 5)}
    assert evaluation.next_rows(batch) == 2
    with pytest.raises(NotImplementedError, match="6 rows do not divide into whole batches on 2 ranks"):
        _Evaluation(rows=6, rank=1, ranks=2, finite_only=True, steps=1).next_rows(batch)


def test_ranks_that_share_sequences_are_refused(checkpoint: Path) -> None:
    """TRL divides the loss of a rank's own labels by their number where nobody counted all."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    add_fused_lm_head(model)
    with pytest.raises(NotImplementedError, match="with sp_size above 1: TRL's trainers"):
        apply_fpdt(model, FPDTPlugin(sp_size=2, chunk_tokens=16), SequenceParallelGroup(size=2))
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16)).remove()
