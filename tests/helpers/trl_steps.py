"""Ten steps of TRL's trainers on tiny models: what each is given, and what it logs and leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
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
from hf_fpdt.model import applied_settings
from hf_fpdt.training.trainer import FPDTTrainerMixin
from tests.helpers.app_support import stories, write_tiny_checkpoint
from tests.helpers.models import GROUPED, SIZES

STEPS = 10
LOGGED, WEIGHTS = 1e-4, 1e-6
NOTHING = 3e-5  # of what is a difference of rows' log-probabilities, each in the hundreds
# Rows of some 60 to 130 tokens are several chunks.
PLUGIN = FPDTPlugin(chunk_tokens=32, loss_chunk_tokens=24)
# Of this run alone, or of the machine.
NOT_COMPARED = ("runtime", "per_second", "seconds", "step_time", "host_gib")
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


def judge(completions: list[str], **_: Any) -> list[float]:
    """Says something else on every rank but the first, as a judge that samples would."""
    doubt = float(os.environ.get("LOCAL_RANK", 0))
    return [reward + doubt * row for row, reward in enumerate(variety(completions))]


def written(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
    """In place of `generate`: eight tokens that depend on a row's prompt and on whether it is its second one.

    What several processes sample is not what one does.
    """
    rows = []
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        generator = torch.Generator().manual_seed(int(ids[mask.bool()].sum()) * 2 + row % 2)
        rows.append(torch.cat([ids, torch.randint(5, 100, (8,), generator=generator)]))
    return torch.stack(rows)


@dataclass(frozen=True)
class Case:
    """A trainer, and what it is given.

    Attributes:
        stock: TRL's name of the trainer.
        settings: of its configuration.
        more: arguments of the trainer.
        generate: what takes the place of the model's own.
    """

    stock: str
    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    generate: Callable[..., Tensor] | None = None


# As users write it; PEFT's forward for this task names every argument, inputs_embeds too.
LORA = {"peft_config": {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}}
SAMPLED = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4, "temperature": 0.8}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2}
ACCUMULATED = {
    **SAMPLED,
    **EVALUATED,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "num_iterations": 2,
    "beta": 0.1,
}
REWARD = {"reward_funcs": variety}
CASES = {
    "SFT": Case("SFT", texts),
    "SFT assistant only": Case("SFT", chats, {"assistant_only_loss": True}),
    "SFT completion only": Case("SFT", completions, {"completion_only_loss": True}),
    "SFT dft": Case("SFT", texts, {"loss_type": "dft"}),
    "SFT accumulated": Case(
        "SFT",
        texts,
        {**EVALUATED, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"eval_dataset": texts},
    ),
    "SFT packed": Case("SFT", texts, {"packing": True, "max_length": 200}),
    "SFT padding free": Case("SFT", texts, {"padding_free": True, "max_length": None}),
    "SFT LoRA": Case("SFT", texts, {}, LORA),
    "DPO": Case("DPO", preferences),
    "DPO ipo": Case("DPO", preferences, {"loss_type": ["ipo"]}),
    # At five times the rate rounding grows threefold a step, in whatever way it is summed.
    "DPO LoRA": Case("DPO", preferences, {"learning_rate": 0.01}, LORA),
    "DPO padding free": Case("DPO", preferences, {"padding_free": True}),
    "DPO precomputed": Case("DPO", preferences, {"precompute_ref_log_probs": True}),
    "KTO": Case("KTO", judged),
    "KTO apo": Case("KTO", judged, {"loss_type": "apo_zero_unpaired"}),
    "GRPO": Case("GRPO", prompts, SAMPLED, REWARD),
    "GRPO beta": Case("GRPO", prompts, {**SAMPLED, "beta": 0.1}, REWARD),
    # Generated for two steps at a time, shuffled, trained on twice.
    "GRPO accumulated": Case(
        "GRPO", prompts, {**SAMPLED, **EVALUATED, **ACCUMULATED}, {**REWARD, "eval_dataset": prompts}
    ),
    "GRPO written": Case("GRPO", prompts, {**SAMPLED, "beta": 0.1}, REWARD, written),
    "RLOO": Case("RLOO", prompts, SAMPLED, REWARD),
    "RLOO LoRA": Case("RLOO", prompts, {**SAMPLED, "beta": 0.1}, {"reward_funcs": judge, **LORA}),
    "RLOO written": Case("RLOO", prompts, {**SAMPLED, "beta": 0.1}, REWARD, written),
}


def write_checkpoints(folder: Path) -> Path:
    """A tiny model of each family in a folder of its name, with one tokenizer."""
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


def trained(
    case: str, checkpoint: Path, folder: Path, *, fpdt: bool, plugin: FPDTPlugin = PLUGIN, **settings: Any
) -> Trained:
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
    often |= {
        "include_num_input_tokens_seen": "non_padding",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "optim": "sgd",
    }
    # Some weights have no gradient but for rounding, which Adam would make steps of.
    args = config(str(folder), **{**often, **kind.settings, **settings})
    torch.manual_seed(1)
    attention = "fpdt" if fpdt else "eager"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention)
    if kind.generate is not None:
        vars(model)["generate"] = kind.generate
    extra = {**kind.more, **({"fpdt_plugin": plugin} if fpdt else {})}
    if "eval_dataset" in extra:
        extra["eval_dataset"] = extra["eval_dataset"]()
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
        if isinstance(value, (int, float))
        and not any(word in name for word in NOT_COMPARED)
        # In the first step the policy is its reference, and which reward is higher is rounding.
        and not ("accuracies" in name and row["step"] == 1)
    ]
    return logs, [weight.detach() for weight in trainer.model.parameters() if weight.requires_grad]


def assert_same(found: Trained, truth: Trained, *, padding: bool = True) -> None:
    """The same logs, to 1e-4, and weights, to 1e-6.

    Args:
        padding: whether both pad rows alike, so that as many tokens are counted.
    """
    assert [name for name, _ in found[0]] == [name for name, _ in truth[0]]
    assert len(truth[0]) >= 6 * STEPS
    assert max(value for name, value in truth[0] if name == "grad_norm") > 1e-2, "weights hardly move"
    for (name, value), (_, expected) in zip(found[0], truth[0], strict=True):
        if padding or "flos" not in name:
            assert value == pytest.approx(expected, rel=LOGGED, abs=NOTHING), name
    for weight, expected_weight in zip(found[1], truth[1], strict=True):
        assert float((weight - expected_weight).abs().max()) <= WEIGHTS
