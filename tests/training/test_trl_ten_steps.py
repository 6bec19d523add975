"""Ten steps of TRL's trainers with the mixin and without: the same losses, gradient norms, metrics and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")  # a machine with a GPU may have none; what it runs is not in here
import trl

from hf_fpdt import FPDTPlugin
from hf_fpdt.labels import shifted
from hf_fpdt.model import applied_settings
from hf_fpdt.model.scoring import log_probs
from hf_fpdt.model.scoring.left_padding import Moved
from hf_fpdt.training.trainer import FPDTTrainerMixin
from tests.helpers.app_support import stories, write_tiny_checkpoint
from tests.helpers.models import GROUPED, SIZES
from tests.helpers.support import assert_rejects

STEPS = 10
LOGGED, WEIGHTS = 1e-4, 1e-6
NOTHING = 3e-5  # of what is a difference of rows' log-probabilities, each in the hundreds
# Rows of some 60 to 130 tokens are several chunks.
PLUGIN = FPDTPlugin(chunk_tokens=32, loss_chunk_tokens=24)
# Of this run alone, or of the machine.
NOT_COMPARED = ("runtime", "per_second", "seconds", "step_time", "host_gib", "flos", "epoch")
CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}\n"
    "{% endgeneration %}{% else %}U:{{ message.content }}\n{% endif %}{% endfor %}"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.1,
    },
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 48},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
}


def texts() -> Dataset:
    return Dataset.from_list([{"text": text[: 200 + 40 * row]} for row, text in enumerate(stories(4))])


def chats() -> Dataset:
    turns = (
        (text[:60], text[60:100], text[100:150], text[150 : 250 + 20 * row]) for row, text in enumerate(stories(4))
    )
    roles = ("user", "assistant", "user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": t} for r, t in zip(roles, row, strict=True)]} for row in turns]
    )


def completions() -> Dataset:
    return Dataset.from_list(
        [{"prompt": t[: 100 + 9 * row], "completion": t[150:300]} for row, t in enumerate(stories(4))]
    )


def preferences() -> Dataset:
    rows = [(t[: 100 + 9 * row], t[150:300], t[500 : 600 + 9 * row]) for row, t in enumerate(stories(4))]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def judged() -> Dataset:
    rows = [(t[: 100 + 9 * row], t[150:300], row % 2 == 0) for row, t in enumerate(stories(4))]
    return Dataset.from_list([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows])


def prompts() -> Dataset:
    """Of different lengths; pairs of them come in one batch, two completions each."""
    return Dataset.from_list([{"prompt": t[: 60 + 30 * row]} for row, t in enumerate(stories(4))])


def variety(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@dataclass(frozen=True)
class Case:
    """A trainer, and what it is given.

    Attributes:
        stock: TRL's name of the trainer.
        settings: of its configuration.
        more: arguments of the trainer.
    """

    stock: str
    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


LORA = {"peft_config": {"target_modules": "all-linear", "r": 4, "init_lora_weights": False}}
SAMPLED = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4, "temperature": 0.8}
REWARD = {"reward_funcs": variety}
CASES = {
    "SFT": Case("SFT", texts),
    "SFT assistant only": Case("SFT", chats, {"assistant_only_loss": True}),
    "SFT completion only": Case("SFT", completions, {"completion_only_loss": True}),
    "SFT dft": Case("SFT", texts, {"loss_type": "dft"}),
    "SFT LoRA": Case("SFT", texts, {}, LORA),
    "DPO": Case("DPO", preferences),
    "DPO ipo": Case("DPO", preferences, {"loss_type": ["ipo"]}),
    # At five times the rate rounding grows threefold a step, in whatever way it is summed.
    "DPO LoRA": Case("DPO", preferences, {"learning_rate": 0.01}, LORA),
    "DPO precomputed": Case("DPO", preferences, {"precompute_ref_log_probs": True}),
    "KTO": Case("KTO", judged),
    "GRPO": Case("GRPO", prompts, SAMPLED, REWARD),
    "GRPO beta": Case("GRPO", prompts, {**SAMPLED, "beta": 0.1}, REWARD),
    "RLOO": Case("RLOO", prompts, SAMPLED, REWARD),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family and one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_checkpoint(folder / "tokenizer"))
    tokenizer.chat_template = CHAT
    for name, settings in FAMILIES.items():
        grouped = {key: value for key, value in GROUPED.items() if key in vars(AutoConfig.for_model(name))}
        sizes = {**SIZES, **grouped, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(name, **{**sizes, **settings})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


Trained = tuple[list[tuple[str, float]], list[Tensor]]


def trained(case: str, checkpoint: Path, folder: Path, *, fpdt: bool, **settings: Any) -> Trained:
    """What ten steps log, (name, value), and the weights after them."""
    kind = CASES[case]
    stock, config = getattr(trl, f"{kind.stock}Trainer"), getattr(trl, f"{kind.stock}Config")
    ours = type(f"Fpdt{kind.stock}", (FPDTTrainerMixin, stock), {})
    often: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
    }
    often |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "optim": "sgd"}
    # Some weights have no gradient but for rounding, which Adam would make steps of.
    args = config(str(folder), **{**often, **kind.settings, **settings})
    torch.manual_seed(1)
    attention = "fpdt" if fpdt else "eager"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention)
    extra = {**kind.more, **({"fpdt_plugin": PLUGIN} if fpdt else {})}
    if "peft_config" in extra:
        extra["peft_config"] = LoraConfig(**extra["peft_config"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = (ours if fpdt else stock)(
        model=model, args=args, train_dataset=kind.data(), processing_class=tokenizer, **extra
    )
    if fpdt and getattr(trainer, "ref_model", None) is not None:
        assert applied_settings(trainer.ref_model) is not None
    trainer.train()
    logs = [
        (name, value)
        for row in trainer.state.log_history
        for name, value in row.items()
        if isinstance(value, float)
        and not any(word in name for word in NOT_COMPARED)
        # In the first step the policy is its reference, and which reward is higher is rounding.
        and not ("accuracies" in name and row["step"] == 1)
    ]
    return logs, [weight.detach() for weight in trainer.model.parameters() if weight.requires_grad]


def assert_same(found: Trained, truth: Trained) -> None:
    assert [name for name, _ in found[0]] == [name for name, _ in truth[0]]
    assert len(truth[0]) >= 6 * STEPS
    assert max(value for name, value in truth[0] if name == "grad_norm") > 1e-2, "weights hardly move"
    for (name, value), (_, expected) in zip(found[0], truth[0], strict=True):
        assert value == pytest.approx(expected, rel=LOGGED, abs=NOTHING), name
    for weight, expected_weight in zip(found[1], truth[1], strict=True):
        assert float((weight - expected_weight).abs().max()) <= WEIGHTS


# Every case, and every family with several.
PAIRS = [
    *(("llama", case) for case in ("SFT", "SFT completion only", "SFT LoRA", "DPO", "DPO LoRA", "DPO precomputed")),
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
    right = log_probs._trls_request
    patch.setattr(log_probs, "_trls_request", lambda forward: replace(right(forward), temperature=1.0))  # type: ignore[type-var]


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
