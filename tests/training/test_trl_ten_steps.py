"""Ten steps of TRL's trainers with the mixin and without: the same losses, gradient norms, metrics and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_fpdt.labels import shifted
from hf_fpdt.model.scoring import log_probs
from hf_fpdt.model.scoring.left_padding import Moved
from tests.helpers.support import assert_rejects
from tests.helpers.trl_steps import Trained, assert_same, trained, write_checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("models"))


# Every case, and every family with several.
PAIRS = [
    *(("llama", case) for case in ("SFT", "SFT completion only", "SFT LoRA", "DPO", "DPO LoRA", "DPO precomputed")),
    ("llama", "DPO padding free"),
    *(("gpt_neox", case) for case in ("SFT dft", "DPO ipo", "GRPO")),
    *(("qwen3_moe", case) for case in ("SFT", "DPO", "GRPO beta")),  # with its auxiliary loss, TRL's default
    *(("gemma2", case) for case in ("SFT assistant only", "GRPO beta")),
    *(("qwen3_5_text", case) for case in ("SFT", "KTO", "RLOO")),
]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_ten_steps_are_those_without_fpdt(family: str, case: str, checkpoints: Path, tmp_path: Path) -> None:
    truth, found = (trained(case, checkpoints / family, tmp_path, fpdt=fpdt) for fpdt in (False, True))
    assert_same(found, truth)


def lost_temperature(patch: pytest.MonkeyPatch) -> None:
    right = log_probs.trls_request
    patch.setattr(log_probs, "trls_request", lambda forward: replace(right(forward), temperature=1.0))  # type: ignore[type-var]


def shifted_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(log_probs, "shifted", lambda labels: shifted(labels.roll(1, 1)))


def doubled_gradient(patch: pytest.MonkeyPatch) -> None:
    right = log_probs.log_probs_by_chunks

    def twice(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return replace(found, log_probs=2 * found.log_probs - found.log_probs.detach())

    patch.setattr(log_probs, "log_probs_by_chunks", twice)


def not_moved_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Moved, "back", lambda self, values: values)


def test_what_is_wrong_in_the_answer_shows(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*, fpdt: bool, wrong: Callable[[pytest.MonkeyPatch], None] | None = None) -> Trained:
        with monkeypatch.context() as patch:
            if wrong is not None:
                wrong(patch)
            return trained("GRPO beta", checkpoints / "llama", tmp_path, fpdt=fpdt, max_steps=3)

    truth = run(fpdt=False)
    assert_same(run(fpdt=True), truth)
    wrong = (lost_temperature, shifted_mask, doubled_gradient, not_moved_back)
    assert_rejects(
        lambda each: assert_same(run(fpdt=True, wrong=each), truth), {each.__name__: each for each in wrong}
    )
