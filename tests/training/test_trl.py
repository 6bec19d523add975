"""TRL's trainers with the mixin train as without it: their own loss, of hidden states that FPDT makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel, Qwen3MoeConfig

pytest.importorskip("trl")  # a machine with a GPU may have none; what it runs is not in here
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import hf_fpdt.model.layers
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.model import applied_settings
from hf_fpdt.model.scoring import log_probs
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.training.evaluation import Evaluation
from hf_fpdt.training.refused import refused_sharing
from hf_fpdt.training.trainer import FPDTTrainerMixin
from tests.helpers.app_support import stories, write_tiny_checkpoint
from tests.helpers.support import assert_rejects

TOLERANCE = 1e-4  # of fp32 sums of a few hundred terms, twice
NOTHING = 1e-6  # losses of policies are sums of advantages, zero but for rounding


class FpdtSft(FPDTTrainerMixin, SFTTrainer):
    """As the README has it."""


class FpdtDpo(FPDTTrainerMixin, DPOTrainer):
    """The same for preferences: a policy, and a reference without gradients."""


class FpdtGrpo(FPDTTrainerMixin, GRPOTrainer):
    """Batches are lists of prompts; what is trained on is generated in the step."""


class FpdtRloo(FPDTTrainerMixin, RLOOTrainer):
    """The same."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def texts() -> Dataset:
    return Dataset.from_list([{"text": text[:400]} for text in stories(4)])


def preferences() -> Dataset:
    rows = [(text[:150], text[150:350], text[500:600]) for text in stories(4)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def prompts(*lengths: int) -> Dataset:
    """Of one length, or with so many words more."""
    more = lengths or (0, 0, 0, 0)
    lines = [f"line {number} of story number {number}" + " line" * words for number, words in enumerate(more)]
    return Dataset.from_list([{"prompt": line} for line in lines])


def variety(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


LORA = {"peft_config": LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)}
REWARD = {"reward_funcs": variety}
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
SAMPLING = {"num_generations": 2, "max_completion_length": 8, "num_iterations": 2}
# Arguments of the trainer and of its configuration.
CASES: dict[str, tuple[Any, Any, Any, Callable[[], Dataset], dict[str, Any], dict[str, Any]]] = {
    "SFT": (SFTTrainer, FpdtSft, SFTConfig, texts, {}, {"max_length": None}),
    "SFT, LoRA": (SFTTrainer, FpdtSft, SFTConfig, texts, LORA, {"max_length": None}),
    "DPO": (DPOTrainer, FpdtDpo, DPOConfig, preferences, {}, {"max_length": None}),
    "DPO, LoRA": (DPOTrainer, FpdtDpo, DPOConfig, preferences, LORA, {"max_length": None}),
    "GRPO": (GRPOTrainer, FpdtGrpo, GRPOConfig, prompts, REWARD, SAMPLING),
    "RLOO": (RLOOTrainer, FpdtRloo, RLOOConfig, prompts, REWARD, SAMPLING),
}
WANTED = (
    *("loss", "grad_norm", "entropy", "eval_loss", "eval_entropy", "logps/chosen", "num_tokens"),
    *("reward", "kl", "clip_ratio/region_mean", "eval_reward", "eval_num_tokens"),
)


def logged(
    case: str,
    checkpoint: Path,
    folder: Path,
    *,
    fpdt: bool,
    change: Callable[[PreTrainedModel], None] | None = None,
    **settings: Any,
) -> list[float]:
    """Loss, gradient norm and TRL's own metrics of two steps and an evaluation."""
    stock, ours, config, data, more, own_settings = CASES[case]
    rows = data()
    often = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    args = config(str(folder), **often, **own_settings, **settings, use_cpu=True, bf16=False, report_to="none")
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
    if fpdt:
        first = next(row for row in trainer.state.log_history if "loss" in row)
        assert first["step_seconds"] > 0 and ("tokens_per_second" in first) == (data is not prompts)
    return [row[name] for row in trainer.state.log_history for name in WANTED if name in row]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_without_fpdt(case: str, checkpoint: Path, tmp_path: Path) -> None:
    truth = logged(case, checkpoint, tmp_path / "stock", fpdt=False)

    def assert_same(change: Callable[[PreTrainedModel], None] | None) -> None:
        found = logged(case, checkpoint, tmp_path / "ours", fpdt=True, change=change)
        assert found == pytest.approx(truth, rel=TOLERANCE, abs=NOTHING)

    def scaled(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 1.5

    assert len(truth) >= 10
    assert_same(None)
    assert_rejects(assert_same, {"a scale": scaled})


def sampling_trainer(kind: str, checkpoint: Path, folder: Path, rows: Dataset, **settings: Any) -> Any:
    """A trainer that generates two completions of a prompt."""
    _, ours, config, _, more, own_settings = CASES[kind]
    often = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1}
    return ours(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        args=config(str(folder), **often, **own_settings, **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        fpdt_plugin=FPDTPlugin(chunk_tokens=64),
        **more,
    )


@pytest.fixture(scope="module")
def learned_positions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embeddings know the place of a token, with the tokenizer of the other."""
    folder, tokenizer = tmp_path_factory.mktemp("learned"), AutoTokenizer.from_pretrained(checkpoint)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "attn_pdrop": 0.0}
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LEARNED = "its embeddings know the place of a token"
ROWS = r"Rows \d and \d of train_dataset, of \d+ and \d+ tokens.*steps_per_generation=1"
REFUSED_PROMPTS = rf"padded on the left.*{LEARNED}. {ROWS}"


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize(
    ("settings", "lengths", "reason"),
    [
        ({"per_device_train_batch_size": 4}, (0, 3, 0, 3), REFUSED_PROMPTS),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, (0, 3, 0, 3), REFUSED_PROMPTS),
        # In a batch of their own: in the order of the data set, or one prompt at a time.
        ({"per_device_train_batch_size": 4, "shuffle_dataset": False}, (0, 0, 3, 3), None),
        ({"per_device_train_batch_size": 2}, (0, 3, 0, 3), None),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
            (0, 3, 0, 3),
            None,
        ),
        (
            {"per_device_train_batch_size": 2, "pad_to_multiple_of": 64},
            (0, 0),
            f"pad_to_multiple_of=64 pads prompts.*{LEARNED}",
        ),
    ],
    ids=str,
)
def test_prompts_padded_on_the_left_are_refused_where_positions_are_learned(
    kind: str,
    settings: dict[str, Any],
    lengths: tuple[int, ...],
    reason: str | None,
    learned_positions: Path,
    tmp_path: Path,
) -> None:
    """By the order in which TRL's own sampler draws them; what is not refused trains."""
    checkpoint = learned_positions
    rows = prompts(*lengths)
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            sampling_trainer(kind, checkpoint, tmp_path, rows, **settings)
    else:
        assert sampling_trainer(kind, checkpoint, tmp_path, rows, **settings).train().global_step == 2


def test_fewer_prompts_than_a_generation_takes_are_trls_own_affair(learned_positions: Path, tmp_path: Path) -> None:
    """It draws none of them, and takes no step."""
    few = {"per_device_train_batch_size": 2, "steps_per_generation": 8}
    assert sampling_trainer("GRPO", learned_positions, tmp_path, prompts(0, 3), **few).train().global_step == 0


def test_prompts_that_a_step_finds_to_differ_are_refused_there_with_what_to_do(
    learned_positions: Path, tmp_path: Path
) -> None:
    """As those that a rollout makes, which nobody knows before."""
    trainer = sampling_trainer("GRPO", learned_positions, tmp_path, prompts(), per_device_train_batch_size=4)
    trainer.train_dataset = prompts(0, 3, 0, 3)
    with pytest.raises(NotImplementedError) as refused:
        trainer.train()
    found = r"padding on the left \(of row \d, \d+ of \d+ tokens\) is not supported with gradients on"
    assert re.search(found, str(refused.value)) and "or one prompt a batch" in str(refused.value)


def test_a_trainer_of_another_kind_that_pads_prompts_is_refused_at_its_step(checkpoint: Path, tmp_path: Path) -> None:
    """Those of trl.experimental tokenise prompts in ways of their own, and make their loss of another call."""
    sdpo = pytest.importorskip("trl.experimental.sdpo")
    args = sdpo.SDPOConfig(
        str(tmp_path), num_generations=2, per_device_train_batch_size=4, max_completion_length=8, **QUIET
    )
    trainer = type("FpdtSdpo", (FPDTTrainerMixin, sdpo.SDPOTrainer), {})(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        args=args,
        train_dataset=prompts(0, 3, 0, 3),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        **REWARD,
    )
    with pytest.raises(NotImplementedError, match="padding on the left"):
        trainer.train()


@pytest.fixture(scope="module")
def experts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose router chooses two of four experts, with the tokenizer of the other."""
    folder, tokenizer = tmp_path_factory.mktemp("experts"), AutoTokenizer.from_pretrained(checkpoint)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=300, num_experts=4, num_experts_per_tok=2, **sizes, **heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_routers_auxiliary_loss_that_is_not_known_is_refused(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL asks for it by itself, whatever the model's configuration says."""
    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func", lambda *_: 0.0)
    with pytest.raises(NotImplementedError, match="auxiliary loss.*computes something else.*router_aux_loss_coef=0.0"):
        logged("SFT", experts, tmp_path, fpdt=True)
    logged("SFT", experts, tmp_path, fpdt=True, router_aux_loss_coef=0.0)


PACKINGS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "packing, several rows": {"packing": True, "packing_strategy": "bfd_split"},
    "padding_free": {"padding_free": True},
}


@pytest.mark.parametrize("settings", PACKINGS)
def test_packed_rows_train_as_without_the_mixin(settings: str, checkpoint: Path, tmp_path: Path) -> None:
    """TRL's own model tells documents apart here, by their positions; ours by whatever TRL says of them."""
    more = PACKINGS[settings]
    ours = {"fpdt_plugin": FPDTPlugin(chunk_tokens=64)}
    plain = trained_on(SFTTrainer, checkpoint, tmp_path, more)
    chunked = trained_on(FpdtSft, checkpoint, tmp_path, more, **ours)
    assert len(plain) == 6 and chunked == pytest.approx(plain, rel=TOLERANCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.model.layers, "documents_of_batch", lambda: None)
        leaky = trained_on(FpdtSft, checkpoint, tmp_path, more, **ours)

    def check(found: list[float]) -> None:
        assert found == pytest.approx(plain, rel=TOLERANCE)

    assert_rejects(check, {"documents see each other": leaky})


def trained_on(kind: Any, checkpoint: Path, folder: Path, settings: dict[str, Any], **more: Any) -> list[float]:
    """Loss and norm of the gradient of two steps, and the loss of an evaluation."""
    often: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    often |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    often |= {"max_length": 200 if settings.get("packing") else None}
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", eval_packing=False, **often, **settings)
    short = Dataset.from_list([{"text": text[: 40 + 60 * index]} for index, text in enumerate(stories(8))])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sets = {"train_dataset": short, "eval_dataset": short.select([1, 2, 5])}
    trainer = kind(model=str(checkpoint), args=args, processing_class=tokenizer, **sets, **more)
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss")
    return [row[name] for row in trainer.state.log_history for name in names if name in row]


def test_a_stream_that_is_cut_in_windows_trains(checkpoint: Path, tmp_path: Path) -> None:
    """TRL's other kind of packing: rows without padding, in which no document is told apart. The model is a name."""
    found = [
        packed_stream(kind, checkpoint, tmp_path, **more)
        for kind, more in ((SFTTrainer, {}), (FpdtSft, {"fpdt_plugin": FPDTPlugin(chunk_tokens=64)}))
    ]
    assert len(found[0]) == 4 and found[1] == pytest.approx(found[0], rel=TOLERANCE)


def packed_stream(kind: Any, checkpoint: Path, folder: Path, **more: Any) -> list[float]:
    often: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    stream: dict[str, Any] = {"max_length": 96, "packing": True, "packing_strategy": "wrapped"}
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **often, **stream)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = kind(model=str(checkpoint), args=args, train_dataset=texts(), processing_class=tokenizer, **more)
    trainer.train()
    return [row[name] for row in trainer.state.log_history for name in ("loss", "grad_norm") if name in row]


def test_an_evaluation_that_would_count_filling_is_refused() -> None:
    """Ranks need whole batches; rows that fill them up are left out by their labels, which preferences do not have."""
    evaluation = Evaluation(rows=6, rank=0, ranks=2, finite_only=True)
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "completion_mask": torch.ones(2, 5)}
    assert evaluation.next_rows(batch) == 2
    with pytest.raises(NotImplementedError, match="6 rows do not divide into whole batches on 2 ranks"):
        Evaluation(rows=6, rank=1, ranks=2, finite_only=True, steps=1).next_rows(batch)


def test_an_evaluation_counts_the_samples_of_a_packed_row() -> None:
    """As Trainer does: each batch's loss once for each of its samples, whatever the collator made of them."""
    row = {"input_ids": torch.zeros(1, 9), "labels": torch.zeros(1, 9)}
    evaluation = Evaluation(rows=None, rank=0, ranks=1, finite_only=True, samples=7, batch_size=3)
    assert [evaluation.next_rows(row) for _ in range(3)] == [3, 3, 1]
    evaluation = Evaluation(rows=5, rank=1, ranks=2, finite_only=True, samples=5, batch_size=3)
    with pytest.raises(NotImplementedError, match="5 samples do not divide.*a batch size of 1"):
        evaluation.next_rows(row)


def test_an_evaluation_counts_pairs_of_preferences() -> None:
    """Two rows each: the one pair of the last batch has as many rows as there are pairs in a whole one."""
    evaluation = Evaluation(rows=None, rank=0, ranks=1, finite_only=True, samples=3, batch_size=2)
    batches = [{"input_ids": torch.zeros(rows, 5, dtype=torch.long)} for rows in (4, 2)]
    assert [evaluation.next_rows(batch) for batch in batches] == [2, 1]


def test_room_is_left_for_a_reference_that_is_scored_between_a_pass_and_its_backward_pass(
    checkpoint: Path, tmp_path: Path
) -> None:
    cases: tuple[tuple[Any, Any, Dataset, dict[str, Any], bool], ...] = (
        (FpdtDpo, DPOConfig, preferences(), {}, True),
        (FpdtDpo, DPOConfig, preferences(), {"precompute_ref_log_probs": True}, False),
        (FpdtSft, SFTConfig, texts(), {}, False),
    )
    for made, config, data, options, expected in cases:
        args = config(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", **options)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        trainer = made(model=str(checkpoint), args=args, train_dataset=data, processing_class=tokenizer)
        settings = applied_settings(trainer.model)
        assert settings is not None and not settings.awaited
        trainer.train()
        assert settings.awaited is expected
        assert {step.awaited for step, _ in trainer.fpdt_handle.store.plans} == {expected}


def test_a_forward_of_another_release_is_refused_where_ranks_share_sequences(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks is not known, and it would divide the loss of a rank's own labels by their number."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    add_fused_lm_head(model)
    plugin = FPDTPlugin(sp_size=2, chunk_tokens=16)
    apply_fpdt(model, plugin, SequenceParallelGroup(size=2)).remove()
    monkeypatch.setattr(log_probs, "_TRLS_SETTINGS", ("scale",))
    with pytest.raises(NotImplementedError, match="with sp_size above 1: TRL's forward is not that of TRL 1.15"):
        apply_fpdt(model, plugin, SequenceParallelGroup(size=2))
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16)).remove()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"use_vllm": True, "vllm_mode": "colocate"}, 'vLLM in mode "colocate".*vllm_mode="server"'),
        ({"use_vllm": True, "vllm_mode": "server"}, None),
        ({"use_transformers_continuous_batching": True}, "continuous batching"),
        ({"rollout_func": len}, "a rollout function"),
        ({"environment_factories": {None: len}}, "environments"),
        ({"tools": [len]}, "tools"),
    ],
    ids=str,
)
def test_what_each_rank_would_sample_by_itself_is_refused(
    given: dict[str, Any], reason: str | None, checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    add_fused_lm_head(model)
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(**given), **given)
    found = refused_sharing(trainer)
    assert len(found) == (reason is not None)
    assert reason is None or (re.search(reason, found[0]) and "by each rank of a group by itself" in found[0])
