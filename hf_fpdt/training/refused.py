"""Which options of a Trainer FPDT cannot honour, known when the trainer is made."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..model import applied_settings, asks_for_log_probs, why_not_moved
from .groups import takes_whole_rows

# Of a sampler's first ones, rows whose prompts are looked at.
SAMPLES = 256
_LOGITS = "whole logits (tokens x vocabulary), which FPDT does not make"
_WHERE_THEY_FIT = "where they fit, train with transformers' Trainer on a model with apply_fpdt, sp_size=1"
_PADS_LEFT = (
    "the collator's tokenizer pads on the left, which is not supported in training; set tokenizer.padding_side = "
    '"right" (labels of padding are -100)'
)


def _metrics_need_logits(trainer: Any) -> bool:
    """Of every token: not those of a classification head, and not where metrics are of generated text."""
    if getattr(trainer.args, "predict_with_generate", False):
        return False
    return trainer.model is None or trainer.model.get_output_embeddings() is not None


def refused_options(trainer: Any, sp_size: int) -> list[str]:
    """What of a Trainer (its `args`, metrics and loss function) FPDT cannot honour, each with its way out."""
    args = trainer.args
    liger = args.liger_kernel_config or {}
    checks = (
        (
            args.label_smoothing_factor,
            f"label_smoothing_factor needs {_LOGITS}: set it to 0; {_WHERE_THEY_FIT}",
        ),
        (
            trainer.compute_metrics is not None and _metrics_need_logits(trainer),
            f"compute_metrics needs {_LOGITS}, before preprocess_logits_for_metrics too: leave it out; evaluate() "
            "gives eval_loss, whose exp is the perplexity, and docs/troubleshooting.md predicts tokens in slices",
        ),
        (
            callable(trainer.compute_loss_func),  # TRL has a string there, for old releases of transformers
            f"compute_loss_func needs {_LOGITS}: leave it out; a loss of log-probabilities is a compute_loss of your "
            f"own that calls hf_fpdt.chunked_log_probs (sp_size=1); {_WHERE_THEY_FIT}",
        ),
        (
            args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True),
            "Liger's fused loss would replace FPDT's; set liger_kernel_config={'fused_linear_cross_entropy': False}",
        ),
        (
            not args.average_tokens_across_devices,
            "average_tokens_across_devices=False counts tokens a rank; leave it on",
        ),
        (
            sp_size > 1 and args.train_sampling_strategy == "batch_rebalance",
            'train_sampling_strategy="batch_rebalance" gives the ranks of a sequence other samples; take another',
        ),
        (
            sp_size > 1 and args.neftune_noise_alpha is not None,
            "neftune_noise_alpha scales its noise by a rank's own number of tokens; leave it out",
        ),
        (_pads_left(trainer), _PADS_LEFT),
        (args.n_gpu > 1, "DataParallel is not supported; start one process a GPU with accelerate launch"),
    )
    return [reason for refused, reason in checks if refused]


def refused_sharing(trainer: Any) -> list[str]:
    """What of a Trainer that makes its loss of whole rows cannot be right where ranks share them; FPDT not applied.

    Ranks of a group must train on the same completions. What `generate()` samples is shared; what each rank gets from
    elsewhere by itself is not.
    """
    args, name = trainer.args, type(trainer).__name__
    by_itself = "would be run by each rank of a group by itself, with completions of its own"
    checks = (
        (
            not asks_for_log_probs(trainer.model),
            f"{name} does not make its loss of the log-probabilities of TRL's fused_lm_head (SFT, DPO, KTO, GRPO and "
            "RLOO do), so it would be that of a rank's part: set sp_size=1",
        ),
        (
            applied_settings(trainer.model) is not None,
            "the model has FPDT already, and TRL's forward around it: give the trainer the model without, it applies "
            "FPDT itself",
        ),
        (
            getattr(args, "use_vllm", False) and getattr(args, "vllm_mode", None) != "server",
            f'vLLM in mode "colocate" {by_itself}: take vllm_mode="server", or use_vllm=False',
        ),
        (
            getattr(args, "use_transformers_continuous_batching", False),
            f"continuous batching of transformers {by_itself}: leave use_transformers_continuous_batching off",
        ),
        *(
            (getattr(trainer, attribute, None), f"{what} {by_itself}: leave them out, or set sp_size=1")
            for attribute, what in (
                ("rollout_func", "a rollout function"),
                ("environment_factories", "environments"),
                ("tools", "tools"),
            )
        ),
    )
    return [reason for refused, reason in checks if refused]


def refused_prompts(trainer: Any) -> list[str]:
    """Prompts that TRL will pad on the left, where the model is not served with such rows; with FPDT applied.

    They are found in the first prompts that TRL's own sampler will draw.
    """
    prompts = _unequal_prompts(trainer)
    why = None if prompts is None else why_not_moved(trainer.model)
    return [] if prompts is None or why is None else [prompts.format(why)]


def refused_evaluation(trainer: Any, ranks: int) -> list[str]:
    """Evaluation sets of a TRL trainer that do not divide, where what fills them up could not be left out of the loss.

    It can where a batch has a row with labels for each sample: DPO's has two, KTO's no labels, a packed one fewer.

    Args:
        ranks: data-parallel ones, which must all be given as many batches.
    """
    sets, batch_size = getattr(trainer, "eval_dataset", None), trainer.args.per_device_eval_batch_size
    never = str(trainer.args.eval_strategy.value) == "no" or not takes_whole_rows(type(trainer))
    if ranks == 1 or never or type(trainer)._get_eval_sampler is not Trainer._get_eval_sampler:
        return []
    each: Any
    for each in sets.values() if isinstance(sets, dict) else [sets]:
        if not hasattr(each, "__len__") or len(each) % (batch_size * ranks) == 0:
            continue
        samples = [each[row] for row in range(min(2, batch_size, len(each)))]
        batch = _collator(trainer)(samples)
        if "labels" not in batch or find_batch_size(batch) != len(samples):
            return [
                f"{len(each)} samples of eval_dataset do not divide into batches of {batch_size} on {ranks} ranks "
                "(those of a group count as one), and what fills the last one up cannot be left out of this "
                f"trainer's loss: give a multiple of {batch_size * ranks}, or another per_device_eval_batch_size"
            ]
    return []


def _unequal_prompts(trainer: Any) -> str | None:
    """Why TRL will pad prompts on the left, with a place for why that is refused; None if it will not.

    Trainers that generate (GRPO, RLOO) fill up the prompts of one generation of a process. Prompts that a rollout or
    an environment makes are known at their step alone.
    """
    args = trainer.args
    data: Any = getattr(trainer, "train_dataset", None)
    generates = hasattr(trainer, "_tokenize_prompts") and hasattr(args, "steps_per_generation")
    made_later = getattr(trainer, "rollout_func", None) or getattr(trainer, "environment_factories", None)
    if not generates or made_later or not hasattr(data, "__len__"):
        return None
    rows = args.per_device_train_batch_size * args.steps_per_generation
    order = list(islice(trainer._get_train_sampler(), max(rows, SAMPLES // rows * rows)))
    drawn = list(dict.fromkeys(order))
    if not drawn:  # fewer prompts than a generation takes: TRL's own affair
        return None
    tokenized = trainer._tokenize_prompts(data[drawn]["prompt"])
    if not isinstance(tokenized, tuple):  # that of a trainer of trl.experimental, whose loss is another call
        return None
    lengths = dict(zip(drawn, map(len, tokenized[0]), strict=True))
    multiple = getattr(args, "pad_to_multiple_of", None) or 1
    for start in range(0, len(order), rows):
        batch = dict.fromkeys(order[start : start + rows])
        short, long = (choose(batch, key=lengths.__getitem__) for choose in (min, max))
        if lengths[short] < -(-lengths[long] // multiple) * multiple:
            return _left_padding(short, long, lengths, multiple)
    return None


def _left_padding(short: int, long: int, lengths: Mapping[int, int], multiple: int) -> str:
    if lengths[short] == lengths[long]:
        return (
            f"pad_to_multiple_of={multiple} pads prompts on the left (row {short} of train_dataset has "
            f"{lengths[short]} tokens), which is not supported in training for this model: {{}}; leave it out"
        )
    return (
        f"prompts are padded on the left, which is not supported in training for this model: {{}}. Rows {short} and "
        f"{long} of train_dataset, of {lengths[short]} and {lengths[long]} tokens, come in one batch; give prompts of "
        "one length, or let a batch have one prompt (per_device_train_batch_size=num_generations, "
        "steps_per_generation=1)"
    )


def _collator(trainer: Any) -> Any:
    """The user's, or the one inside of ours."""
    collator = getattr(trainer, "data_collator", None)
    return getattr(collator, "inner", collator)


def _pads_left(trainer: Any) -> bool:
    """Whether rows are filled up on the left: of several rows, or up to a multiple."""
    collator = _collator(trainer)
    left = getattr(getattr(collator, "tokenizer", None), "padding_side", "right") == "left"
    several = trainer.args.per_device_train_batch_size > 1
    return left and (several or bool(getattr(collator, "pad_to_multiple_of", None)))
