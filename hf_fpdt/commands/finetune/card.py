"""The model card (README.md of the output folder), filled from what was measured in the run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any

from .merge import MERGED
from .quantise import NONE

TEMPLATE = Path(__file__).resolve().with_name("template.md")
PICTURE = "![Loss at each position of held-out windows, before and after]($name)\n\n"

LOADING_ADAPTER = """\
import hf_fpdt  # registers attn_implementation="fpdt"; without it, take "sdpa"
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

adapter = "$folder"  # this folder, or its hub name
config = AutoConfig.from_pretrained(adapter)  # the base's config with the rotary parameters trained with
model = AutoModelForCausalLM.from_pretrained("$base", config=config, attn_implementation="fpdt", dtype="$dtype")
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)"""

LOADING_QUANTISED = """\
import hf_fpdt  # registers attn_implementation="fpdt"; without it, take "sdpa"
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

adapter = "$folder"  # this folder, or its hub name
config = AutoConfig.from_pretrained(adapter)  # the base's config with the rotary parameters trained with
bits = BitsAndBytesConfig($bits)  # left out, it runs on the base as it is
model = AutoModelForCausalLM.from_pretrained(
    "$base", config=config, attn_implementation="fpdt", dtype="$dtype", quantization_config=bits
)
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)"""

BITS = MappingProxyType(
    {
        "int8": "load_in_8bit=True",
        "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        'bnb_4bit_compute_dtype="{compute}"',
    }
)
BASES = MappingProxyType(
    {
        "nf4": "The base was held in NF4 (bitsandbytes, scales quantised too) and dequantised layer by layer; the "
        "losses above are on that base. On the base as it is they differ a little. ",
        "int8": "The base was held in int8 (bitsandbytes' rows and scales) and dequantised layer by layer; the losses "
        "above are on that base. On the base as it is, or with the int8 products of LLM.int8, they differ a little. ",
    }
)

LOADING_FULL = """\
import hf_fpdt  # registers attn_implementation="fpdt"; without it, take "sdpa"
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "$folder"  # this folder, or its hub name
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fpdt", dtype="$dtype")
tokenizer = AutoTokenizer.from_pretrained(folder)"""


OR_THE_ADAPTER = """
```

Or the adapter, on its base:

```python
"""


def loading_code(facts: Mapping[str, Any]) -> str:
    """The exact code that loads the result with the rotary parameters it was trained with; a merged model first."""
    arguments, folder = facts["arguments"], facts["trainer"]["output_dir"]
    names = {"folder": folder, "base": arguments["model"], "dtype": arguments["dtype"]}
    if arguments["full"]:
        return Template(LOADING_FULL).substitute(names)
    if arguments["quantize"] != NONE:
        names["bits"] = BITS[arguments["quantize"]].format(compute=arguments["compute_dtype"])
    adapter = Template(LOADING_ADAPTER if arguments["quantize"] == NONE else LOADING_QUANTISED).substitute(names)
    if not arguments["merge"]:
        return adapter
    merged = Template(LOADING_FULL).substitute({**names, "folder": str(Path(folder) / MERGED)})
    return merged + OR_THE_ADAPTER + adapter


def write_card(path: Path, facts: Mapping[str, Any], loss_table: str, picture: str | None) -> None:
    """Fill the template; a place without a fact is an error, never an empty line in the card."""
    arguments, data = facts["arguments"], facts["data"]
    full = arguments["full"]
    places = {
        # The hub knows base models by hub name only; a local folder there would be flagged as an error.
        "base_model": "" if Path(arguments["model"]).exists() else f"base_model: {arguments['model']}\n",
        "library_name": "transformers" if full else "peft",
        "extra_tags": "- full-fine-tune" if full else "- lora",
        "title": f"{Path(arguments['model']).name} at {data['longest_window_tokens']:,} tokens",
        "summary": _summary(facts),
        "eval_windows": data["eval_windows"],
        "eval_length": f"{data['eval_length_tokens']:,}",
        "eval_documents": _names(data["eval_documents"]),
        "picture": Template(PICTURE).substitute(name=picture) if picture else "",
        "loss_table": loss_table,
        "loss_note": _loss_note(facts),
        "loading_code": loading_code(facts),
        "loading_note": _loading_note(facts),
        "rope_text": _rope_text(facts["rope"]),
        "training_rows": _rows(_training_facts(facts)),
        "data_text": _data_text(facts),
        "command": facts["command"],
        "environment_rows": _rows({**facts["hardware"], **facts["versions"]}),
        "limits_text": _limits(facts),
    }
    path.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(places), encoding="utf-8")


def command_line(argv: Sequence[str]) -> str:
    """The command as it can be pasted, options on their own lines."""
    words = [shlex.quote(word) for word in argv]
    return " \\\n    ".join(["hf-fpdt finetune", *_grouped(words)])


def _grouped(words: list[str]) -> list[str]:
    groups: list[str] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    return groups


def _names(names: list[str], shown: int = 12) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"`{name}`" for name in names[:shown]) + more


def _rows(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())


def _summary(facts: Mapping[str, Any]) -> str:
    arguments, rope, longest = facts["arguments"], facts["rope"], facts["data"]["longest_window_tokens"]
    what = "All weights" if arguments["full"] else f"A LoRA adapter (rank {arguments['lora_r']})"
    base = "" if arguments["quantize"] == NONE else f", held in {arguments['quantize'].upper()}"
    return (
        f"{what} of `{arguments['model']}`{base}, trained for {facts['steps']} steps on sequences of "
        f"{longest:,} tokens; the base was pre-trained up to {rope['pretrained_tokens']:,}."
    )


def _loss_note(facts: Mapping[str, Any]) -> str:
    stock = "*before* is the stock model, unchanged."
    if facts["rope"]["kind"] == "none":
        return stock
    return f"{stock} The middle column is the same stock weights with the new rotary embedding, before any training."


def _loading_note(facts: Mapping[str, Any]) -> str:
    merged = BASES.get(facts["arguments"]["quantize"], "")
    if facts["arguments"]["merge"]:
        dtype = facts["arguments"]["dtype"]
        merged += f"The merged weights are rounded to {dtype} once more; the losses above are the adapter's. "
    if facts["arguments"]["full"] or facts["rope"]["kind"] == "none":
        return f"{merged}`apply_fpdt(model)` from hf_fpdt then runs the layers chunk by chunk, in training too."
    return (
        f"{merged}The `config=` matters: the adapter was trained with other rotary parameters than the base's own "
        "config has. Loading the base alone, or this adapter's hub name through `AutoModelForCausalLM`, takes the "
        "base's config and gives other losses without an error. `apply_fpdt(model)` from hf_fpdt then runs "
        "the layers chunk by chunk, and warns where the model has other rotary parameters than the adapter."
    )


def _rope_text(rope: Mapping[str, Any]) -> str:
    if rope["kind"] == "none":
        return f"Unchanged: `{rope['before']}`." if rope["before"] else "The model has none."
    return f"Before: `{rope['before']}`\n\nNow, also in `config.json` here: `{rope['after']}`"


def _training_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    arguments, trainer, losses = facts["arguments"], facts["trainer"], facts["training_losses"]
    batches = f"{trainer['per_device_train_batch_size']} × {trainer['gradient_accumulation_steps']} windows"
    peak = f"{trainer['learning_rate']:g}, {trainer['warmup_steps']:g} warm-up steps"
    rows = {
        "sequence length": f"{facts['data']['longest_window_tokens']:,} tokens, up to {arguments['max_length']:,}",
        "chunk": f"{_count(arguments['chunk_tokens'])} tokens",
        "processes": f"{facts['processes']}, {arguments['sp_size']} a sequence",
        "steps": f"{facts['steps']} of {batches}",
        "learning rate": f"{peak}, {_schedule(trainer)}",
        "optimizer": trainer["optim"],
        "weights": "all" if arguments["full"] else _lora_text(arguments),
        "dtype": arguments["dtype"],
        "seed": trainer["seed"],
    }
    if losses:
        rows |= {"loss of the first step": f"{losses[0]:.3f}", "loss of the last step": f"{losses[-1]:.3f}"}
    seconds = {f"seconds, {name}": f"{value:.1f}" for name, value in facts["phase_seconds"].items()}
    return {**rows, **seconds, "tokens a second in training": f"{facts['training_tokens_per_s']:,.0f}"}


def _schedule(trainer: Mapping[str, Any]) -> str:
    kwargs = trainer["lr_scheduler_kwargs"]
    return f"{trainer['lr_scheduler_type']} {kwargs}" if kwargs else str(trainer["lr_scheduler_type"])


def _count(tokens: int | str) -> str:
    return tokens if isinstance(tokens, str) else f"{tokens:,}"


def _lora_text(arguments: Mapping[str, Any]) -> str:
    where = ", ".join(arguments["lora_target_modules"])
    numbers = f"rank {arguments['lora_r']}, alpha {arguments['lora_alpha']}, dropout {arguments['lora_dropout']}"
    return f"LoRA {numbers}, on {where}"


def _data_text(facts: Mapping[str, Any]) -> str:
    data, arguments = facts["data"], facts["arguments"]
    sources = ", ".join(f"`{source}`" for source in arguments["data"])
    return (
        f"Data: {sources}, {data['documents']} documents of {data['tokens']:,} tokens, as {data['windows']} "
        f"windows, {100 * data['filled']:.1f} % filled. Documents are packed whole, each closed by an end-of-sequence "
        f"token, and do not see one another; {data['dropped_documents']} longer than a window were left out, "
        f"{data['cut_documents']} were cut."
    )


def _limits(facts: Mapping[str, Any]) -> str:
    return (
        f"The loss was measured on {facts['data']['eval_windows']} windows of "
        f"{facts['data']['eval_length_tokens']:,} tokens from the documents named above, and on nothing else: "
        "no task, no longer text and no safety test. The figures hold for this data. The licence of the base "
        "model and of the data apply."
    )
