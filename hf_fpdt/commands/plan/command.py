"""`hf-fpdt plan`: what a step takes on given machines, or the longest sequence that fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group
from transformers import PreTrainedConfig
from transformers.utils import logging as of_transformers

from ...config import CHECKPOINT_POLICIES, auto_chunk_tokens
from ...forecast import (
    GPU,
    GPUS,
    STEP_TOKENS,
    Machines,
    PlannedStep,
    Reach,
    Training,
    fit,
    host_needed,
    longest,
    machine_bytes,
    memory_curve,
    reach_by_host,
    read_rates,
    what_would_help,
    with_memory,
)
from ...model import QUANTISED_KINDS, expert_weights, training_of_model, why_refused
from ...plan import OPTIMIZERS, described_windows
from ...units import GIB
from ..check.compare import why_refused_tiny
from ..options import (
    DEFAULT_SHAPE,
    UserMistake,
    add_model,
    amount,
    built_without_memory,
    check_picture,
    config_of,
    corpus_of,
    count,
    mistakes,
    new_parser,
    tokens,
)
from ..pictures import PictureError, check_matplotlib
from .picture import draw_plan
from .tables import WIDTH, as_json, plan_tables

PLAN_HELP = """\
Says from a model's configuration alone, without weights and without a GPU, whether a sequence of --seq-len tokens
can be trained on the given GPUs and host memory, what lies where, and about how long a step takes; without --seq-len,
the longest sequence that can, and what would make it longer; without --host-mem, the host memory that it needs. All
GPUs share one sequence (sp_size). A model that FPDT refuses to train is not planned; the reasons are printed.

Bytes are those that FPDT itself plans with at run time. Seconds come from rates measured on an H100 (twenty-nine
steps of Llama, GPT-NeoX and Qwen3 shapes were within 5 % of them); for other GPUs they are derived from data sheets.
With --rates they are those of your own GPU, as `hf-fpdt check --measure --rates FILE` found them. What several GPUs
send each other is reckoned with NVLink inside hosts of eight and one network card for each GPU between hosts.
"""
PLAN_EXAMPLES = """\
examples:
  hf-fpdt plan --shape llama-8b --host-mem 128                       the longest sequence on one H100
  hf-fpdt plan --shape llama-8b --host-mem 128 --seq-len 512K        what 512K tokens take there
  hf-fpdt plan --shape llama-8b --gpus 4 --gpu-mem 80 --host-mem 512 --full --fsdp --optimizer adamw-8bit
  hf-fpdt plan --shape llama-8b --gpus 4 --seq-len 2M                what host memory 2M tokens need
  hf-fpdt plan meta-llama/Llama-3.1-70B --gpus 32 --host-mem 4096 --fsdp --seq-len 1M
  hf-fpdt plan ./my-model --gpu a100-80 --gpus 4 --host-mem 1024 --full --fsdp --json
  hf-fpdt plan --shape qwen3-32b --host-mem 128 --seq-len 128K --quantize nf4         QLoRA
  hf-fpdt plan --host-mem 128 --seq-len 512K --plot plan.png         the same as a picture
  hf-fpdt plan --host-mem 128 --seq-len 256K --documents lognormal:8K,1.2   a row of packed documents
"""


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `hf-fpdt plan`."""
    parser = new_parser(
        commands,
        plan,
        about="what a length takes on given GPUs, or the longest that fits; needs no GPU",
        description=PLAN_HELP,
        epilog=PLAN_EXAMPLES,
    )
    add_model(parser.add_argument_group("what to train").add_mutually_exclusive_group())
    training = parser.add_argument_group("how")
    training.add_argument("--seq-len", type=tokens, metavar="TOKENS", help="default: the longest that fits")
    training.add_argument(
        "--documents",
        metavar="HOW",
        help="what rows are packed of: lognormal:MEAN,SIGMA in tokens, as in lognormal:8K,1.2, or a JSON file with a "
        "list of lengths (default: one document a row)",
    )
    training.add_argument("--chunk-tokens", type=tokens, metavar="TOKENS", help="default: what FPDTPlugin would take")
    trained = training.add_mutually_exclusive_group()
    trained.add_argument("--lora", action="store_true", help="train adapters of rank 16 on every linear (the default)")
    trained.add_argument("--full", action="store_true", help="train every weight")
    training.add_argument(
        "--quantize",
        choices=QUANTISED_KINDS,
        help="linears under the adapters in 4 bits (NF4, scales quantised too) or 8, as bitsandbytes holds them; one "
        "layer at a time is dequantised (default: bfloat16)",
    )
    training.add_argument(
        "--host-weights",
        action="store_true",
        help="layers' frozen weights in host memory, fetched one layer ahead (FPDTPlugin.host_weights)",
    )
    training.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="default: %(default)s")
    training.add_argument("--checkpoints", choices=CHECKPOINT_POLICIES, default="auto", help="default: %(default)s")
    machines = parser.add_argument_group("on what")
    kind = machines.add_mutually_exclusive_group()
    kind.add_argument(
        "--gpu", choices=list(GPUS), default="h100", help="kind of GPU; of another, see --rates (default: %(default)s)"
    )
    kind.add_argument("--rates", type=Path, metavar="FILE", help="your own GPU, from hf-fpdt check --measure --rates")
    machines.add_argument("--gpu-mem", type=amount, metavar="GB", help="of each GPU, as sold (default: its kind's)")
    machines.add_argument("--gpus", type=count, default=1, help="all of one sequence (default: %(default)s)")
    machines.add_argument(
        "--host-mem", type=amount, metavar="GIB", help="of all machines together (left out: what --seq-len needs)"
    )
    machines.add_argument("--disk", type=amount, default=0.0, metavar="GIB", help="for files (default: none)")
    machines.add_argument(
        "--fsdp",
        action="store_true",
        help="shard weights over the GPUs (FSDP2 with mixed precision: those that train are in fp32)",
    )
    output = parser.add_argument_group("what to write")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over a step, and how far hosts reach")


def _gpu(options: argparse.Namespace) -> GPU:
    with mistakes(ValueError, OSError):
        gpu = GPUS[options.gpu] if options.rates is None else read_rates(options.rates)
    return gpu if options.gpu_mem is None else with_memory(gpu, options.gpu_mem)


def plan(options: argparse.Namespace) -> None:
    """`hf-fpdt plan`: what a step takes, or the longest sequence that fits."""
    if options.plot is not None:
        with mistakes(PictureError):
            check_matplotlib()
        check_picture("--plot", options.plot)
    _check_weights(options)
    config = config_of(options, layers=None)
    with _errors_alone():
        training = _training(options, config)
    machines = _machines(options)
    _check_gpus(options, training)
    least, helps = None, {}
    with mistakes(MemoryError):
        if options.host_mem is None:
            least, found = host_needed(training, machines, options.seq_len)
            machines = replace(machines, host_bytes=machine_bytes(found.host))
        elif options.seq_len is not None:
            found = fit(training, machines, options.seq_len)
        else:
            found, helps = _longest(training, machines), what_would_help(training, machines)
    if note := _beyond_positions(config, found.step.plan.n_tokens):
        print(note, file=sys.stderr)
    if options.json:
        print(json.dumps(as_json(found, helps, least)))
    else:
        _console().print(Group(*plan_tables(found, machines, helps, least)))
    if options.plot is not None:
        _draw(options, training, machines, found)


def _check_weights(options: argparse.Namespace) -> None:
    for option, why in (("full", "weights that train stay on the GPU"), ("fsdp", "FSDP2 does not shard such weights")):
        if options.host_weights and getattr(options, option):
            raise UserMistake(f"--host-weights: {why}; leave --{option} out.")
    for option, why in (("full", "quantised weights do not train"), ("fsdp", "FSDP2 does not shard such weights")):
        if options.quantize is not None and getattr(options, option):
            raise UserMistake(f"--quantize {options.quantize}: {why}; leave --{option} out.")


def _console() -> Console:
    """Of the terminal, or for a file; never too narrow for the tables."""
    console = Console()
    console.width = max(console.width, WIDTH)
    return console


def _check_gpus(options: argparse.Namespace, training: Training) -> None:
    """They share the heads and every chunk."""
    heads = training.model.q_heads

    def chunk(gpus: int) -> int:
        return int(options.chunk_tokens or auto_chunk_tokens(gpus, on_gpu=True))

    work = [str(gpus) for gpus in range(1, heads + 1) if heads % gpus == 0 and chunk(gpus) % gpus == 0]
    if str(options.gpus) not in work:
        raise UserMistake(
            f"--gpus {options.gpus}: the GPUs of a sequence share its {heads} query heads and every chunk of "
            f"{training.chunk_tokens:,} tokens, so it must divide both; take one of {', '.join(work)}."
        )


def _beyond_positions(config: PreTrainedConfig, n_tokens: int) -> str | None:
    """A note where the model was not made for so many tokens; a plan is of memory and seconds alone."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    positions = getattr(text, "max_position_embeddings", None) or n_tokens
    stretched = (rope.get("original_max_position_embeddings") or positions) * (rope.get("factor") or 1)
    reach = max(positions, int(stretched))
    if n_tokens <= reach:
        return None
    # There may be none, or the parameters of one that is not used.
    if rope and getattr(text, "position_embedding_type", "rope") == "rope":
        advice = (
            "stretch its rotary embedding (hf-fpdt finetune --rope_scaling yarn, or rope_parameters in config.json)"
        )
    else:
        advice = "it has no rotary embedding to stretch; see how it reads beyond them (hf-fpdt eval)"
    ends = f"{n_tokens:,} tokens fit in memory, but this model's configuration ends at {reach:,} positions"
    return f"note: {ends}: {advice}"


@contextmanager
def _errors_alone() -> Iterator[None]:
    """No warnings of transformers inside: which kernels this machine lacks says nothing of the one planned for."""
    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(before)


def _training(options: argparse.Namespace, config: PreTrainedConfig) -> Training:
    model = built_without_memory(config)
    reasons = "; ".join(why_refused(model))
    refusal = f"FPDT cannot run {type(model).__name__}: {reasons}." if reasons else None
    if refusal := refusal or why_refused_tiny(model.config.get_text_config()):
        raise UserMistake(f"there is nothing to plan. {refusal}")
    if options.quantize is not None and (experts := expert_weights(model)):
        print(
            f"note: {experts:,} weights are experts that the model holds as one parameter; bitsandbytes quantises "
            "linears alone, so they are planned in bfloat16",
            file=sys.stderr,
        )
    training = training_of_model(model, lora=not options.full, quantised=options.quantize)
    chunk_tokens = options.chunk_tokens or auto_chunk_tokens(options.gpus, on_gpu=True)
    weights = replace(training.weights, optimizer=options.optimizer)
    return replace(
        training,
        weights=weights,
        chunk_tokens=chunk_tokens,
        auto_chunk=options.chunk_tokens is None,
        checkpoints=options.checkpoints,
        host_weights=options.host_weights,
        documents=None if options.documents is None else corpus_of(options.documents),
    )


def _machines(options: argparse.Namespace) -> Machines:
    if options.host_mem is None and options.seq_len is None:
        raise UserMistake("--host-mem is needed to find the longest sequence; or --seq-len, to find what it needs.")
    return Machines(
        gpu=_gpu(options),
        gpus=options.gpus,
        host_bytes=int((options.host_mem or 0) * GIB),
        disk_bytes=int(options.disk * GIB),
        sharded=options.fsdp,
    )


def _longest(training: Training, machines: Machines) -> PlannedStep:
    found = longest(training, machines)
    if found is None:
        raise UserMistake(f"not even {STEP_TOKENS:,} tokens fit; see --seq-len {STEP_TOKENS} for the arithmetic.")
    return found


def _draw(options: argparse.Namespace, training: Training, machines: Machines, found: PlannedStep) -> None:
    print("drawing: looking for the longest sequence with other amounts of host memory …", file=sys.stderr)
    tokens_planned, host_gib = found.step.plan.n_tokens, machines.host_bytes / GIB
    name = options.model or options.shape or DEFAULT_SHAPE
    title = f"{name}, {tokens_planned:,} tokens on {machines.gpus} x {machines.gpu.name}"
    title = ", ".join([title, *described_windows(found.step)])
    with mistakes(OSError):
        draw_plan(
            options.plot,
            title,
            memory_curve(found, full=options.full),
            {"device": machines.gpu.memory_gib, "host": host_gib},
            list(reach_by_host(training, machines)),
            Reach(host_gib, tokens_planned),
        )
    print(f"picture: {options.plot}", file=sys.stderr)
