"""What a user may choose: one frozen object, in Accelerate's plugin habit.

Every field can also be set by an environment variable, so that a script started by `accelerate launch` needs no code:
`FPDT_` and the field's name in capitals (`FPDT_CHUNK_TOKENS=32K`). An argument given in code wins over the
environment, and takes the same texts. Sizes in tokens take the suffixes K and M (1K = 1024), on command lines too.
"""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from dataclasses import dataclass, field, fields
from typing import Any, Literal

KERNEL_NAMES = ("auto", "fa4", "flash-attn-3", "flash-attn-2", "cudnn", "flash", "efficient", "cpu", "math")
CHECKPOINT_POLICIES = ("auto", "linears", "attention", "input", "segment")


def parse_tokens(text: str) -> int:
    """Number of tokens in `text`: "8192", "32K" (1024 each) or "1M" (1024 × 1024 each).

    Raises:
        ValueError: `text` is no such number.
    """
    scale = {"K": 1024, "M": 1024**2}.get(text[-1:].upper(), 1)
    number = text if scale == 1 else text[:-1]
    try:
        tokens = float(number) * scale
    except ValueError:
        tokens = float("nan")
    if not tokens.is_integer():
        raise ValueError(f"A number of tokens was expected (8192, 32K, 1M), got {text!r}.")
    return int(tokens)


def _tokens_or_auto(text: str) -> int | str:
    return "auto" if text == "auto" else parse_tokens(text)


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"A whole number from 1 was expected, got {text!r}.") from None


def _number_or_auto(text: str) -> float | str:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f'"auto" or a number of GiB was expected, got {text!r}.') from None


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError(f"True or False was expected (as text {', '.join(values)}), got {text!r}.")
    return values[text.lower()]


def _from_env(name: str, parse: Any, default: Any) -> Any:
    """A dataclass field whose default is the environment variable `FPDT_<name>`, else `default`.

    Args:
        parse: reads the field from a text.
    """

    def read() -> Any:
        text = os.environ.get(f"FPDT_{name}")
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"hf_fpdt: the environment variable FPDT_{name} cannot be read: {error}") from None

    return field(default_factory=read, metadata={"parse": parse})


@dataclass(frozen=True, kw_only=True, slots=True)
class FPDTPlugin:
    """Settings of FPDT (Fully Pipelined Distributed Transformer, arXiv 2408.16978) for one model.

    A field takes the text that its environment variable takes, too: `FPDTPlugin(chunk_tokens="32K")`.

    Attributes:
        sp_size: Ranks that share one sequence (Ulysses, paper section 4.1). 1: each process trains its own sequences.
        chunk_tokens: GLOBAL tokens of one sequence that a chunk holds, summed over its `sp_size` ranks. "auto": 32,768
            on GPUs, from 8 ranks on 8,192 for each; 4,096 on a CPU. With `sp_size=1` and without FSDP2 it is less
            where that does not fit: the largest half, quarter, … that does. Smaller saves memory; below about 16K a
            GPU is no longer busy.
        kernel: Attention kernel, a name of `hf_fpdt.attention.KERNELS`. "auto": the fastest that serves this machine
            and dtype. A named kernel that cannot serve the model is refused when FPDT is applied, as far as it is
            known where the model will run; nothing falls back in silence.
        checkpoints: What the backward pass finds of the forward pass. "attention": every layer's attention output, so
            that attention is not run again, and as many inputs as the budgets hold; the others are rebuilt, token by
            token. "input": every layer's input; half the memory, one more attention forward a layer. "segment": the
            fewest inputs; about a third of "input" for 32 layers, at one more token-wise forward. "linears": every
            input, every attention output and what every linear of a layer gave, so that next to nothing is computed
            twice; four to six times the memory of "attention". "auto": what takes least time of all that fit, outputs
            of linears by layer and chunk among it; no other policy keeps some of them.
        device_budget_gib: GPU memory that K, V and checkpoints may fill: 0 puts all of it on the host, "auto" takes
            what a step leaves (on a CPU: no limit).
        host_budget_gib: Pinned host memory that they may fill, in GiB of EACH process; "auto": what is available, less
            6 GiB, shared by the processes of the machine.
        disk_dir: Folder for what neither holds, which exists; a local SSD, shared likewise. Nothing is left there,
            however the process ends.
        host_weights: Keep the frozen weights of layers in pinned host memory, of EACH process, and fetch a layer while
            the one before it computes: for adapters on models that a GPU does not hold. What trains stays there.
        loss_chunk_tokens: Tokens whose logits exist at a time. "auto": as many as make 1 GiB of fp32 logits.
        fused: Run faster twins of a layer's own pieces: LoRA without passes of its own, chosen experts as one
            operation, no product whose value nobody reads, and Liger's norm, SwiGLU and RoPE on a GPU where
            `liger-kernel` is installed.
        progress: Show a line inside long steps (layer, chunk, speed, time left) where there is a terminal.

    Raises:
        ValueError: a field has a value that is not allowed, or a variable FPDT_... is none of a field.
    """

    sp_size: int = _from_env("SP_SIZE", _count, 1)
    chunk_tokens: int | Literal["auto"] = _from_env("CHUNK_TOKENS", _tokens_or_auto, "auto")
    kernel: str = _from_env("KERNEL", str, "auto")
    checkpoints: str = _from_env("CHECKPOINTS", str, "auto")
    device_budget_gib: float | Literal["auto"] = _from_env("DEVICE_BUDGET_GIB", _number_or_auto, "auto")
    host_budget_gib: float | Literal["auto"] = _from_env("HOST_BUDGET_GIB", _number_or_auto, "auto")
    disk_dir: str | None = _from_env("DISK_DIR", str, None)
    host_weights: bool = _from_env("HOST_WEIGHTS", _flag, False)
    loss_chunk_tokens: int | Literal["auto"] = _from_env("LOSS_CHUNK_TOKENS", _tokens_or_auto, "auto")
    fused: bool = _from_env("FUSED", _flag, True)
    progress: bool = _from_env("PROGRESS", _flag, False)

    def __post_init__(self) -> None:
        _check_environment([f"FPDT_{f.name.upper()}" for f in fields(self)])
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):
                object.__setattr__(self, f.name, _read(f.name, value, f.metadata["parse"]))
        _check_count("sp_size", self.sp_size)
        for name in ("chunk_tokens", "loss_chunk_tokens"):
            if getattr(self, name) != "auto":
                _check_count(name, getattr(self, name))
        for name in ("device_budget_gib", "host_budget_gib"):
            _check_gib(name, getattr(self, name))
        _check_choice("kernel", self.kernel, KERNEL_NAMES)
        _check_choice("checkpoints", self.checkpoints, CHECKPOINT_POLICIES)
        for name in ("host_weights", "fused", "progress"):
            _check_flag(name, getattr(self, name))
        if self.disk_dir is not None:
            _check_folder("disk_dir", self.disk_dir)
        if self.chunk_tokens != "auto" and self.chunk_tokens % self.sp_size:
            raise ValueError(
                f"FPDTPlugin(chunk_tokens={self.chunk_tokens}): it is cut in sp_size={self.sp_size} equal pieces; "
                f"take a multiple of {self.sp_size}."
            )


def _check_environment(known: list[str]) -> None:
    """A variable that nobody reads would leave its setting at the default, and nobody would know."""
    for name in sorted(os.environ):
        if name.startswith("FPDT_") and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"hf_fpdt: the environment variable {name}={os.environ[name]!r} is no setting of FPDT; {nearest} is "
                f"the nearest one. Rename or unset it; known are {', '.join(known)}."
            )


def _read(name: str, text: str, parse: Any) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"FPDTPlugin({name}={text!r}): {error}") from None


def _check_folder(name: str, value: object) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"FPDTPlugin({name}={value!r}): a folder or None is expected.")
    folder, why = os.fspath(value), None
    if not os.path.isdir(folder):
        why = "it is no folder" if os.path.exists(folder) else "it does not exist"
    else:
        try:
            # Permissions do not tell of a file system that is read-only, or of root on a network's.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            why = f"no file can be made there ({error.strerror})"
    if why is not None:
        raise ValueError(
            f"FPDTPlugin({name}={value!r}): {why}; a folder that you may write to is expected. Make it, or name "
            "another one, on a local SSD."
        )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"FPDTPlugin({name}={value!r}): a whole number from 1 is expected.")


def _check_gib(name: str, value: object) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f'FPDTPlugin({name}={value!r}): "auto" or a number of GiB from 0 is expected.')


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"FPDTPlugin({name}={value!r}): True or False is expected.")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"FPDTPlugin({name}={value!r}): one of {', '.join(map(repr, allowed))} is expected.")


AUTO_CHUNK_TOKENS_GPU = 32_768
AUTO_RANK_TOKENS_GPU = 8_192
AUTO_CHUNK_TOKENS_CPU = 4_096


def resolve_chunk_tokens(plugin: FPDTPlugin, *, on_gpu: bool) -> int:
    """Global tokens a chunk; "auto" is resolved by device, down to a multiple of `sp_size`."""
    if plugin.chunk_tokens != "auto":
        return plugin.chunk_tokens
    return auto_chunk_tokens(plugin.sp_size, on_gpu=on_gpu)


def auto_chunk_tokens(sp_size: int, *, on_gpu: bool) -> int:
    """Global tokens a chunk for "auto": on GPUs enough that each has 8,192 of them for its matrix products."""
    chunk_tokens = max(AUTO_CHUNK_TOKENS_GPU, AUTO_RANK_TOKENS_GPU * sp_size) if on_gpu else AUTO_CHUNK_TOKENS_CPU
    return chunk_tokens - chunk_tokens % sp_size
