"""The command `hf-fpdt`. Each sub-command is one `_add_…` for its options and one function that does it."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from .arguments import amount, count, gib, tokens
from .bench import options as bench_options
from .bench.children import run_child
from .bench.driver import Bench
from .bench.figures import FORMULAS, Trained
from .bench.job import Job
from .bench.report import Files, as_table, conditions_line
from .config import CHECKPOINT_POLICIES, KERNEL_NAMES, FPDTPlugin
from .fit import STEP_TOKENS, Machines, fit, longest, what_would_help
from .plan_report import as_json, as_text, training_of
from .rates import GPUS
from .recording import Recording, record_step
from .shapes import SHAPES, with_layers
from .trace import TraceError, middle_layer
from .trace_file import read_trace
from .trace_picture import PictureError, check_matplotlib, draw

DEFAULT_SHAPE = "llama-8b"
PICTURE_ENDINGS = (".png", ".svg", ".pdf")


class UserMistake(Exception):
    """Ends the command with its message and exit status 2, without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for a mistake of the user's."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserMistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-fpdt",
        description="Tools around FPDT training: exact training of Hugging Face models on very long sequences.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_trace(commands)
    _add_bench(commands)
    return parser


def _add_model(group: argparse._MutuallyExclusiveGroup) -> None:
    """MODEL or --shape, as `_config` reads them."""
    group.add_argument("model", nargs="?", metavar="MODEL", help="hub name or folder whose configuration is taken")
    group.add_argument("--shape", choices=list(SHAPES), help=f"a known model's sizes (default: {DEFAULT_SHAPE})")


@contextmanager
def _mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """What is raised in here of these kinds says what the user can mend."""
    try:
        yield
    except kinds as error:
        raise UserMistake(" ".join(str(error).split())) from error


# hf-fpdt plan --------------------------------------------------------------------------------------------------------

PLAN_HELP = """\
Says from a model's configuration alone, without weights and without a GPU, whether a sequence of --seq-len tokens
can be trained on the given GPUs and host memory, what lies where, and about how long a step takes; without --seq-len,
the longest sequence that can, and what would make it longer. All GPUs share one sequence (sp_size).

Bytes are those that FPDT itself plans with at run time. Seconds come from rates measured on an H100 (steps of a
Llama-8B with LoRA from 128K to 512K tokens were within 2 % of them); for other GPUs they are derived from data sheets.
"""
PLAN_EXAMPLES = """\
examples:
  hf-fpdt plan --shape llama-8b --host-mem 128                       the longest sequence on one H100
  hf-fpdt plan --shape llama-8b --host-mem 128 --seq-len 512K        what 512K tokens take there
  hf-fpdt plan meta-llama/Llama-3.1-70B --gpus 32 --host-mem 4096 --fsdp --seq-len 1M
  hf-fpdt plan ./my-model --gpu a100-80 --gpus 4 --host-mem 1024 --full --fsdp --json
"""


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a length takes on given GPUs, or the longest that fits; needs no GPU",
        description=PLAN_HELP,
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=plan)
    _add_model(parser.add_argument_group("what to train").add_mutually_exclusive_group())
    training = parser.add_argument_group("how")
    training.add_argument("--seq-len", type=tokens, metavar="TOKENS", help="default: the longest that fits")
    training.add_argument("--chunk-tokens", type=tokens, default="32K", metavar="TOKENS", help="default: %(default)s")
    training.add_argument("--full", action="store_true", help="train every weight (default: LoRA, rank 16)")
    training.add_argument("--checkpoints", choices=CHECKPOINT_POLICIES, default="auto", help="default: %(default)s")
    machines = parser.add_argument_group("on what")
    machines.add_argument("--gpu", choices=list(GPUS), default="h100", help="kind of GPU (default: %(default)s)")
    machines.add_argument("--gpus", type=count, default=1, help="all of one sequence (default: %(default)s)")
    machines.add_argument("--host-mem", type=amount, required=True, metavar="GIB", help="of all machines together")
    machines.add_argument("--disk", type=amount, default=0.0, metavar="GIB", help="for files (default: none)")
    machines.add_argument("--fsdp", action="store_true", help="shard weights over the GPUs (FSDP2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def plan(options: argparse.Namespace) -> None:
    """`hf-fpdt plan`: what a step takes, or the longest sequence that fits."""
    training = training_of(_config(options, layers=None), lora=not options.full)
    training = replace(training, chunk_tokens=options.chunk_tokens, checkpoints=options.checkpoints)
    machines = Machines(
        gpu=GPUS[options.gpu],
        gpus=options.gpus,
        host_bytes=int(options.host_mem * 2**30),
        disk_bytes=int(options.disk * 2**30),
        sharded=options.fsdp,
    )
    if training.model.q_heads % options.gpus or options.chunk_tokens % options.gpus:
        raise UserMistake(
            f"--gpus {options.gpus}: the GPUs of a sequence share its {training.model.q_heads} query heads and every "
            f"chunk of {options.chunk_tokens:,} tokens, so it must divide both."
        )
    with _mistakes(MemoryError):
        found = longest(training, machines) if options.seq_len is None else fit(training, machines, options.seq_len)
    if found is None:
        raise UserMistake(f"not even {STEP_TOKENS:,} tokens fit; see --seq-len {STEP_TOKENS} for the arithmetic.")
    helps = {} if options.seq_len is not None else what_would_help(training, machines)
    print(json.dumps(as_json(found, helps)) if options.json else as_text(found, machines, helps))


# hf-fpdt trace -------------------------------------------------------------------------------------------------------

TRACE_HELP = """\
Runs one training step (forward and backward) on this machine's GPU under torch.profiler, and draws what the GPU did
during the decoder layer in the middle: its computation, the copies from the host and those to the host. Copies that
lie under computation cost no time. The picture shows those that do not, and where computation waited.

Weights and tokens are random: the sizes are what matters, so of a model only the configuration is read.
"""
TRACE_EXAMPLES = """\
examples:
  hf-fpdt trace --seq-len 128K                        Llama-3.1-8B's shape, three layers, picture in trace.png
  hf-fpdt trace ./my-model --full --seq-len 256K      a model folder's own shape, every weight trained
  hf-fpdt trace --json step.json.gz                   keep the trace (Perfetto and chrome://tracing read it too)
  hf-fpdt trace --from step.json.gz --out step.png    draw a kept trace again; needs no GPU
"""


def _add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "trace",
        help="picture of one layer on the GPU: computation, and the copies under it",
        description=TRACE_HELP,
        epilog=TRACE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=trace)
    model = parser.add_argument_group("what to run").add_mutually_exclusive_group()
    _add_model(model)
    model.add_argument("--from", dest="source", type=Path, metavar="FILE", help="draw this trace; nothing is run")
    _add_step_options(parser.add_argument_group("the step"))
    output = parser.add_argument_group("what to write")
    output.add_argument("--out", type=Path, default=Path("trace.png"), help="the picture (default: %(default)s)")
    output.add_argument("--json", type=Path, metavar="FILE", help="keep the trace here (.json or .json.gz)")


def _add_step_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--layers", type=count, default=3, help="layers of the model to keep (default: %(default)s)")
    group.add_argument(
        "--seq-len", type=tokens, default="128K", metavar="TOKENS", help="8192, 128K, 1M, … (default: %(default)s)"
    )
    group.add_argument(
        "--chunk-tokens", type=tokens, default="32K", metavar="TOKENS", help="tokens a chunk (default: %(default)s)"
    )
    group.add_argument("--full", action="store_true", help="train every weight (default: LoRA, rank 16, all linears)")
    group.add_argument(
        "--device-budget-gib",
        type=gib,
        default=0.0,
        metavar="GIB",
        help='GPU memory for stored K, V and checkpoints, or "auto" (default: 0, all of it on the host)',
    )
    group.add_argument(
        "--checkpoints",
        choices=CHECKPOINT_POLICIES,
        default="attention",
        help="what backward finds of forward (default: %(default)s)",
    )
    group.add_argument(
        "--kernel", choices=KERNEL_NAMES, default="auto", help="attention kernel (default: %(default)s)"
    )


def trace(options: argparse.Namespace) -> None:
    """`hf-fpdt trace`: record a step, or read one that was, and draw the layer in the middle."""
    with _mistakes(PictureError):
        check_matplotlib()
    _check_outputs(options)
    if options.source is not None:
        if options.json is not None:
            raise UserMistake("--json keeps the trace of a step that is run, and --from runs none; leave one out.")
        _draw(options.source, options.out)
        return
    recording = _recording(options)
    with TemporaryDirectory() as folder:
        path = options.json or Path(folder) / "trace.json"
        _record(recording, path)
        _draw(path, options.out)
    if options.json is not None:
        print(f"trace: {options.json}")


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the minutes of a run, not after."""
    if options.out.suffix not in PICTURE_ENDINGS:
        raise UserMistake(f"--out {options.out}: a name that ends in {', '.join(PICTURE_ENDINGS)} is expected.")
    for path in (options.out, options.json):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserMistake(f"{path} cannot be written: it is a folder, or {path.parent} is none.")


def _recording(options: argparse.Namespace) -> Recording:
    if not torch.cuda.is_available():
        raise UserMistake(
            "hf-fpdt trace runs a step on a CUDA GPU, and torch finds none here; record with --json on a machine that "
            "has one, and draw that file here with --from."
        )
    config = _config(options, layers=options.layers)
    # One process, whatever FPDT_SP_SIZE says.
    with _mistakes(ValueError):
        plugin = FPDTPlugin(
            sp_size=1,
            chunk_tokens=options.chunk_tokens,
            kernel=options.kernel,
            checkpoints=options.checkpoints,
            device_budget_gib=options.device_budget_gib,
        )
    name = options.model or f"the {options.shape or DEFAULT_SHAPE} shape"
    return Recording(name=name, config=config, n_tokens=options.seq_len, lora=not options.full, plugin=plugin)


def _config(options: argparse.Namespace, *, layers: int | None) -> PreTrainedConfig:
    """Of MODEL or --shape, with that many layers, or its own."""
    if options.model is None:
        config = SHAPES[options.shape or DEFAULT_SHAPE]()
        return config if layers is None else with_layers(config, layers)
    with _mistakes(OSError, ValueError):
        config = AutoConfig.from_pretrained(options.model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserMistake(f"{options.model} is a {config.model_type} model; a causal language model is expected.")
    return config if layers is None else with_layers(config, layers)


def _record(recording: Recording, path: Path) -> None:
    print(f"recording a step of {recording.name}, {recording.n_tokens:,} tokens …", file=sys.stderr)
    # PEFT still asks by the old name of a property; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        with _mistakes(NotImplementedError, OSError):
            record_step(recording, path)
    except torch.OutOfMemoryError as error:
        raise UserMistake(
            f"the step does not fit in the GPU's memory ({str(error).partition('. ')[0]}); take a smaller --seq-len, "
            "--chunk-tokens or --layers, or --device-budget-gib 0."
        ) from error


def _draw(source: Path, out: Path) -> None:
    with _mistakes(TraceError):
        found = read_trace(source)
        timelines = middle_layer(found)
    print("\n".join(timeline.summary() for timeline in timelines))
    with _mistakes(OSError):
        draw(timelines, out, found.title or source.name, found.conditions)
    print(f"picture: {out}")


# hf-fpdt bench -------------------------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="steps of this package and of others side by side: speed, memory, the longest sequence",
        description=bench_options.description(),
        epilog=bench_options.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=bench)
    _add_model(parser.add_argument_group("what to train").add_mutually_exclusive_group())
    bench_options.add_options(parser)


def bench(options: argparse.Namespace) -> None:
    """`hf-fpdt bench`: check every stack, measure every length, print the table."""
    for path in (options.csv, options.json):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserMistake(f"{path} cannot be written: it is a folder, or {path.parent} is none.")
    training = training_of(_config(options, layers=options.layers), lora=False)
    shape = options.shape or DEFAULT_SHAPE
    job = _job(options, shape)
    measured = Bench(
        job=job,
        stacks=tuple(options.stacks),
        trained=Trained(sizes=training.model, vocabulary=training.vocabulary, full=options.full),
        name=options.model or shape,
        longest=options.longest,
        run=lambda job: run_child(job, options.limit),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    with _mistakes(FileExistsError):
        files, rows = Files(options.csv, options.json), []
    for row in measured.rows():
        files.add(row)
        rows.append(row)
    print(as_table(rows))
    print(f"\n{conditions_line(rows)}\n\n{FORMULAS}")


def _job(options: argparse.Namespace, shape: str) -> Job:
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UserMistake("--device cuda: torch finds no CUDA GPU here; leave the option out, or take --device cpu.")
    return Job(
        kind="step",
        stack="",
        model=options.model,
        shape=shape,
        layers=options.layers,
        full=options.full,
        tokens=tuple(options.seq_len),
        steps=options.steps,
        chunk_tokens=options.chunk_tokens,
        device=options.device if options.device != "auto" else "cuda" if has_gpu else "cpu",
        dtype=options.dtype,
    )


if __name__ == "__main__":
    raise SystemExit(main())
