"""`hf-fpdt check`: which kernels this machine has, whether a model is served and computed exactly, and how fast."""

from __future__ import annotations

import argparse
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ...attention import KERNELS, AttentionSpec
from ...engine import scan_packages
from ...forecast import GPU, save_rates
from ...model import QUANTISED_KINDS, check_quantised_here, why_refused
from ...plan import attention_sizes
from ..accuracy import FACTOR
from ..measure import link_rates, measured
from ..options import (
    DEFAULT_SHAPE,
    UserMistake,
    add_model,
    built_without_memory,
    check_settings,
    check_writable,
    config_of,
    mistakes,
    new_parser,
    plain,
)
from .adapter import Adapter, adapter_of
from .compare import (
    Finding,
    NothingToCompare,
    TinyModel,
    check_attention,
    check_dtype,
    kernels_here,
    kinds_of,
    training_dtype,
)

CHECK_HELP = """\
Answers before you train: which attention kernels does this machine have, and why not the others? Can FPDT train this
model? If so, are its loss and gradients right here?

For the last, a tiny copy of the model with random weights (its architecture and features, two layers, small sizes)
makes one training step with every kernel, beside plain attention and the same step in float64, and another on a row
of packed documents, beside each of them alone. FPDT's errors may be at most twice those of plain attention. That takes
seconds; of a model only the configuration is read.

Of an adapter's folder (PEFT's) such an adapter is trained on a tiny copy of its base; it also says whether the adapter
was trained with other rotary parameters than its base has.

Exit status: 0 served and right, 1 not (the reasons are printed), 2 the command was not given what it needs.
"""
CHECK_EXAMPLES = """\
examples:
  hf-fpdt check                                         this machine, with Llama-3.1-8B's shape
  hf-fpdt check ./my-model                              a model folder, or a hub name
  hf-fpdt check out/books                               an adapter's folder: with its base, and its rotary parameters
  hf-fpdt check --measure --rates gpu.json              also how fast the GPU is; keep that
  hf-fpdt plan --host-mem 128 --rates gpu.json          … and plan with it
"""
NAME_WIDTH = 15
Device = torch.device


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The options of `hf-fpdt check`."""
    parser = new_parser(
        commands,
        check,
        about="whether this machine trains a model exactly: kernels, errors, speed",
        description=CHECK_HELP,
        epilog=CHECK_EXAMPLES,
    )
    which = parser.add_argument_group("which model")
    add_model(which.add_mutually_exclusive_group(), "hub name or folder whose configuration is taken; or an adapter's")
    which.add_argument(
        "--quantize",
        choices=QUANTISED_KINDS,
        help="the copy's linears in 4 or 8 bits under adapters, against the dequantised copy in float64; bitsandbytes",
    )
    which.add_argument("--base-model", metavar="NAME", help="of an adapter, where its base is not where it was")
    speed = parser.add_argument_group("how fast (on a GPU)")
    speed.add_argument("--measure", action="store_true", help="measure kernels, matrix products, memory and link")
    speed.add_argument("--rates", type=Path, metavar="FILE", help="keep what was measured, for hf-fpdt plan --rates")


def check(options: argparse.Namespace) -> int:
    """`hf-fpdt check`: prints what it finds; 0 where the model is served and computed exactly, else 1."""
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    _check_rates_option(options, device)
    check_settings()
    if options.quantize is not None:
        with mistakes(ImportError):
            check_quantised_here()
    adapter = adapter_of(options.model, options.base_model)
    config = config_of(options, layers=None) if adapter is None else adapter.config
    architecture, reasons = _refusals(config, adapter)
    print(f"machine   {_machine(device)}")
    text = config.get_text_config()
    for kind in kinds_of(text):
        _print_kernels(device, kind)
    _print_scans(config, device)
    name = f"{options.model or f'the {options.shape or DEFAULT_SHAPE} shape'} ({architecture})"
    if adapter is not None:
        _print_items("adapter  ", adapter.lines())
    if reasons:
        _print_refused(name, reasons)
    passed = not reasons and _check_model(name, TinyModel(text, device, adapter, options.quantize))
    if options.measure:
        _measure(device, options.rates)
    return 0 if passed else 1


def _check_rates_option(options: argparse.Namespace, device: Device) -> None:
    """Before anything is run, not after."""
    path = options.rates
    if path is None:
        return
    if not options.measure:
        raise UserMistake(f"--rates {path} keeps what --measure finds; add --measure.")
    if device.type != "cuda":
        raise UserMistake(f"--rates {path}: there is no CUDA GPU here whose rates could be measured.")
    check_writable(path)


def _machine(device: Device) -> str:
    where = f"{os.cpu_count()} CPU cores, no CUDA GPU"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.1f} GiB"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def _print_kernels(device: Device, kind: AttentionSpec) -> None:
    dtype = training_dtype(device)
    reasons = kernels_here(device, dtype, kind)
    auto = next((name for name, reason in reasons.items() if reason is None), None)
    print(f"kernels   for {_short(dtype)}, {_kind(kind)}")
    for name, reason in reasons.items():
        serves = 'yes, and what "auto" takes' if name == auto else "yes"
        print(f"  {name:{NAME_WIDTH}} {reason or serves}")


def _print_scans(config: Any, device: Device) -> None:
    """The scans of recurrent layers, and where each comes from."""
    packages = scan_packages(built_without_memory(config))
    for name, package in packages.items():
        said = "in PyTorch alone" if package is None else f"of the package {package}"
        slow = ", much slower: pip install hf_fpdt[recurrent]" if package is None and device.type == "cuda" else ""
        print(f"scan      {name} {said}{slow}")


def _kind(spec: AttentionSpec) -> str:
    heads = f"heads of {spec.head_dim}"
    heads += "" if spec.value_dim == spec.head_dim else f" for keys and of {spec.value_dim} for values"
    heads += "" if spec.window is None else f", a window of {spec.window:,} keys"
    return heads + ("" if spec.softcap is None else f", softcap {spec.softcap:g}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The model -----------------------------------------------------------------------------------------------------------


def _check_model(name: str, tiny: TinyModel) -> bool:
    try:
        findings = list(_findings(tiny, tiny.device))
    except NothingToCompare as error:
        print(f"model     {name} has nothing that FPDT refuses.")
        print(f"result    nothing was compared: a tiny copy of the model does not run by itself ({error}).")
        return False
    except (NotImplementedError, RuntimeError) as error:
        _print_refused(name, [plain(error)])
        return False
    print(f"model     {name} is supported: FPDT can train it exactly.")
    print(
        f"errors    as multiples of plain attention's in the same dtype, on a tiny copy of "
        f"{tiny.config.num_hidden_layers} layers; up to {FACTOR:.1f} is right"
    )
    for finding in findings:
        print(f"  {_line(finding)}")
    if tiny.refused_documents is not None:
        print(
            textwrap.fill(f"packed    documents are refused: {tiny.refused_documents}", 110, subsequent_indent="    ")
        )
    return _verdict(findings)


def _refusals(config: Any, adapter: Adapter | None) -> tuple[str, list[str]]:
    """The class of the model, built without memory for its weights, and why FPDT will not have it."""
    model = built_without_memory(config)
    name = type(model).__name__
    return name, why_refused(model if adapter is None else adapter.put_on(model).get_base_model())


def _print_refused(model: str, reasons: list[str]) -> None:
    print(f"model     {model} is not supported:")
    _print_items("", reasons)


def _print_items(head: str, items: Sequence[str]) -> None:
    if head:
        print(f"{head} {items[0]}")
    for reason in items[1:] if head else items:
        text = f"{reason}.".replace("..", ".")
        # Names of folders are to be pasted whole.
        whole: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
        print(textwrap.fill(text, 110, initial_indent="  - ", subsequent_indent="    ", **whole))


def _findings(tiny: TinyModel, device: Device) -> Iterator[Finding]:
    """Of every kernel that serves each kind of its layers: attention alone, by kind, and a step of the model."""
    heads, kinds = attention_sizes(tiny.config), kinds_of(tiny.config)
    if not kinds:  # no layer attends, so whichever is named serves
        yield tiny.check("auto", torch.float32)
    for kernel in KERNELS if kinds else ():
        dtype = check_dtype(kernel, device, kinds)
        if dtype is not None:
            alone = [check_attention(kernel, dtype, (heads.q_heads, heads.kv_heads), kind, device) for kind in kinds]
            yield next((finding for finding in alone if not finding.passed), max(alone, key=lambda each: each.ratio))
            if all(finding.ratio != float("inf") for finding in alone):
                yield tiny.check(kernel, dtype)
                documents = tiny.check_documents(kernel, dtype)
                yield from () if documents is None else (documents,)


def _line(finding: Finding) -> str:
    what = {"attention": "attention alone", "documents": "packed, the same"}.get(finding.what, "loss, gradients")
    verdict = "right" if finding.passed else "WRONG"
    return (
        f"{finding.kernel:{NAME_WIDTH}} {what}  {_short(finding.dtype):9} {verdict}  "
        f"{finding.ratio:.2f} ({finding.worst})"
    )


def _verdict(findings: list[Finding]) -> bool:
    wrong = sorted({finding.kernel for finding in findings if not finding.passed})
    if wrong:
        print(
            f"result    not right with kernel {', '.join(wrong)}: do not train with it here; name another one in "
            "FPDTPlugin(kernel=...), and please report this output."
        )
    else:
        kernels = sorted({finding.kernel for finding in findings})
        print(f"result    right with every kernel that is here: {', '.join(kernels)}.")
    return not wrong


# Rates ---------------------------------------------------------------------------------------------------------------


def _measure(device: Device, path: Path | None) -> None:
    if device.type != "cuda":
        print("rates     there is no CUDA GPU here to measure.")
        return
    note = f"{date.today()}, torch {torch.__version__}"
    gpu = measured(device, training_dtype(device), name=torch.cuda.get_device_name(), note=note)
    print("\n".join(rates_lines(gpu, link_rates(device))))
    if path is not None:
        with mistakes(OSError):
            save_rates(gpu, path)
        print(f"kept      {path}; plan with it: hf-fpdt plan --rates {path}")


def rates_lines(gpu: GPU, link: tuple[float, float]) -> list[str]:
    """What was measured, for people.

    Args:
        link: bytes a second to the device and back.
    """
    lines = [f"rates     {gpu.name}, {gpu.memory_gib:.1f} GiB free"]
    lines.append(f"  matrix products       {gpu.matmul / 1e12:8.1f} TFLOP/s")
    for width, (forward, backward) in gpu.attention.items():
        name = "/".join(map(str, width)) if isinstance(width, tuple) else str(width)
        rates = f"{forward / 1e12:8.1f} TFLOP/s forward, {backward / 1e12:.1f} backward"
        lines.append(f"  attention, heads {name:>4} {rates}")
    lines.append(f"  device memory         {gpu.memory / 1e9:8,.0f} GB/s")
    lines.append(f"  link, pinned memory   {link[0] / 1e9:8.1f} GB/s to the GPU, {link[1] / 1e9:.1f} back")
    return lines
