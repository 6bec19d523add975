"""`hf-fpdt trace`: a step on this machine's GPU, and the picture of the layer in its middle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState

from ...config import CHECKPOINT_POLICIES, KERNEL_NAMES, FPDTPlugin
from ...plan import LayersDiffer
from ..options import (
    DEFAULT_SHAPE,
    UserMistake,
    add_model,
    check_picture,
    check_writable,
    config_of,
    count,
    gib,
    mistakes,
    new_parser,
    tokens,
)
from ..pictures import PictureError, check_matplotlib
from .picture import draw
from .recording import Recording, record_step
from .timeline import TraceError, middle_layer
from .trace_file import read_trace

TRACE_HELP = """\
Runs one training step (forward and backward) on this machine's GPU under torch.profiler, and draws what the GPU did
during the decoder layer in the middle: its computation, the copies from the host and those to the host. Copies that
lie under computation cost no time. The picture shows those that do not, and where computation waited. Started by
torchrun, all GPUs share the sequence, and what they send each other is drawn too, of the first of them.

Weights and tokens are random: the sizes are what matters, so of a model only the configuration is read.
"""
TRACE_EXAMPLES = """\
examples:
  hf-fpdt trace --seq-len 128K                        Llama-3.1-8B's shape, three layers, picture in trace.png
  hf-fpdt trace ./my-model --full --seq-len 256K      a model folder's own shape, every weight trained
  hf-fpdt trace --json step.json.gz                   keep the trace (Perfetto and chrome://tracing read it too)
  hf-fpdt trace --from step.json.gz --out step.png    draw a kept trace again; needs no GPU
  torchrun --nproc-per-node 2 -m hf_fpdt.commands.main trace    the same step on two GPUs
"""


def add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `hf-fpdt trace`."""
    parser = new_parser(
        commands,
        trace,
        about="picture of one layer on the GPU: computation, and the copies under it",
        description=TRACE_HELP,
        epilog=TRACE_EXAMPLES,
    )
    model = parser.add_argument_group("what to run").add_mutually_exclusive_group()
    add_model(model)
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
    with mistakes(PictureError):
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
        if not PartialState().is_main_process:
            return
        _draw(path, options.out)
    if options.json is not None:
        print(f"trace: {options.json}")


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the minutes of a run, not after."""
    check_picture("--out", options.out)
    if options.json is not None:
        check_writable(options.json)


def _recording(options: argparse.Namespace) -> Recording:
    if not torch.cuda.is_available():
        raise UserMistake(
            "hf-fpdt trace runs a step on a CUDA GPU, and torch finds none here; record with --json on a machine that "
            "has one, and draw that file here with --from."
        )
    config = config_of(options, layers=options.layers)
    # All processes share the sequence, whatever FPDT_SP_SIZE says.
    with mistakes(ValueError):
        plugin = FPDTPlugin(
            sp_size=PartialState().num_processes,
            chunk_tokens=options.chunk_tokens,
            kernel=options.kernel,
            checkpoints=options.checkpoints,
            device_budget_gib=options.device_budget_gib,
        )
    name = options.model or f"the {options.shape or DEFAULT_SHAPE} shape"
    return Recording(name=name, config=config, n_tokens=options.seq_len, lora=not options.full, plugin=plugin)


def _record(recording: Recording, path: Path) -> None:
    PartialState().print(f"recording a step of {recording.name}, {recording.n_tokens:,} tokens …", file=sys.stderr)
    try:
        with mistakes(NotImplementedError, LayersDiffer, OSError):
            record_step(recording, path)
    except torch.OutOfMemoryError as error:
        raise UserMistake(
            f"the step does not fit in the GPU's memory ({str(error).partition('. ')[0]}); take a smaller --seq-len, "
            "--chunk-tokens or --layers, or --device-budget-gib 0."
        ) from error


def _draw(source: Path, out: Path) -> None:
    with mistakes(TraceError):
        found = read_trace(source)
        timelines = middle_layer(found)
    print("\n".join(timeline.summary() for timeline in timelines))
    with mistakes(OSError):
        draw(timelines, out, found.title or source.name, found.conditions)
    print(f"picture: {out}")
