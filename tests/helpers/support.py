"""What the numeric tests share: comparisons that can fail, hard inputs, and groups of gloo processes."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._device import _device_constructors

from hf_fpdt.attention.reference import peaked_qkv as peaked_qkv

PRELOADED = ("hf_fpdt", "peft", "transformers.models.llama", "transformers.models.gpt_neox", "torch.distributed.fsdp")
GROUP_TIMEOUT = timedelta(seconds=300)
# What FSDP2 calls; from torch 2.13 on the second name of each.
FSDP_CALLS = dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), "gathered")
FSDP_CALLS |= dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), "reduced")


def max_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, taken in float64; NaN if either holds one."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a.detach().double() - b.detach().to(a.device).double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b| in float64: the error of a against the reference b."""
    error, size = max_error(a, b), max_error(b, torch.zeros_like(b))
    if size == 0:
        return error if error == 0 else float("inf")
    return error / size


def assert_as_accurate(
    ours: Tensor, naive: Tensor, truth_fp64: Tensor, factor: float = 2.0, name: str = "tensor"
) -> None:
    """Fail unless our error against float64 is at most `factor` times that of a naive run in the same dtype.

    Where the naive run is right by luck, the bound is half a unit in the last place of the largest value: no
    result of that dtype can be asked for more. A float64 result has no better truth: use `relative_error`.
    """
    assert truth_fp64.dtype == torch.float64, f"{name}: the truth must be float64, not {truth_fp64.dtype}"
    assert ours.dtype == naive.dtype, f"{name}: dtypes differ, {ours.dtype} and {naive.dtype}"
    our_error, naive_error = max_error(ours, truth_fp64), max_error(naive, truth_fp64)
    half_ulp = torch.finfo(ours.dtype).eps / 2 * max_error(truth_fp64, torch.zeros_like(truth_fp64))
    bound = max(factor * naive_error, half_ulp)
    # Written so that a NaN on either side fails.
    assert naive_error == naive_error and our_error <= bound, (
        f"{name}: our error {our_error:.3e} is above {bound:.3e} "
        f"(naive error {naive_error:.3e}, factor {factor:g}, half ulp {half_ulp:.3e})"
    )


def assert_rejects(check: Callable[[Any], object], broken_variants: Mapping[str, Any]) -> None:
    """Fail unless `check(variant)` raises AssertionError for every variant, a broken value or implementation.

    A variant that raises anything else proves nothing about the check, and fails too.
    """
    assert broken_variants, "no broken variant given: this proves nothing"
    for name, variant in broken_variants.items():
        try:
            check(variant)
        except AssertionError:
            continue
        except Exception as error:
            raise AssertionError(f"broken variant {name!r} crashed instead of being rejected") from error
        raise AssertionError(f"the check lets the broken variant {name!r} pass")


@contextmanager
def nan_filled_empty(package: str = "hf_fpdt") -> Iterator[None]:
    """While active, new uninitialised tensors hold NaN when code of `package` asks for them.

    A buffer that nobody wrote then shows in the result, not only when the allocator happens to hand out dirty
    memory. Byte buffers get 0xFF, which is NaN in every floating view of them.
    """
    # A `with torch.device(...)` block gathers the functions it acts on once a process: ours must not be among them.
    _device_constructors()
    sites = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
    # Methods that torch.Tensor inherits are put back by deleting ours.
    saved = [(owner, name, owner.__dict__.get(name)) for owner, name in sites]
    for owner, name in sites:
        setattr(owner, name, _poisoned(getattr(owner, name), package))
    try:
        yield
    finally:
        for owner, name, original in saved:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _poisoned(original: Callable[..., Tensor], package: str) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        made = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == package or caller.startswith(package + "."):
            with torch.no_grad():
                if made.is_floating_point():
                    made.fill_(float("nan"))
                elif made.dtype == torch.uint8:
                    made.fill_(255)
        return made

    return make


@contextmanager
def counting_fsdp(rank_count: int) -> Iterator[dict[str, int]]:
    """Bytes that this rank sends as FSDP2 gathers weights ("gathered") and reduces gradients ("reduced")."""
    sent = {"gathered": 0, "reduced": 0}
    saved = {name: getattr(dist, name) for name in FSDP_CALLS if hasattr(dist, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            sent[FSDP_CALLS[name]] += whole * (rank_count - 1) // rank_count
            return saved[name](*args, **kwargs)

        return call

    for name in saved:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name, function in saved.items():
            setattr(dist, name, function)


def spawn(fn: Callable[..., object], world_size: int, *args: Any) -> None:
    """Run `fn(rank, world_size, *args)` in `world_size` processes joined in a gloo group.

    `fn` and `args` must pickle: `fn` is a function at the top of a test module. The usual variables of a
    launcher (RANK, WORLD_SIZE, MASTER_ADDR, …) are set in each process. If any fails, the traceback of the
    first is raised here: as AssertionError if it was one, else as RuntimeError.
    """
    with TemporaryDirectory() as folder:
        try:
            # Children fork from a server that has the slow imports done: a second each instead of ten.
            mp.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
            work = (fn, world_size, _free_port(), Path(folder), args)
            mp.start_processes(_child, work, world_size, daemon=True, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # The process whose end was noticed first is often one that only lost its peer.
            reports = sorted(Path(folder).glob("rank *"), key=lambda path: path.stat().st_mtime_ns)
            if not reports:
                raise
            kind, _, text = reports[0].read_text().partition("\n")
            failure = AssertionError if kind == "AssertionError" else RuntimeError
            raise failure(f"{reports[0].name} of {world_size} failed first:\n{text}") from error


def _free_frames(error: BaseException | None) -> None:
    """Let go of what the frames of a traceback hold, DDP's reducer above all.

    If the reducer outlives the process group, its end joins gloo's threads with the interpreter's lock in hand, which
    one of them may be waiting for: the process hangs.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int, fn: Callable[..., object], world_size: int, port: int, reports: Path, args: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # They meet in a file: a port that was free a moment ago may by now be another job's.
    meeting = f"file://{reports}/store"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    try:
        with nan_filled_empty():
            fn(rank, world_size, *args)
    except Exception as error:
        # Before the group goes, and with it the peers.
        (reports / f"rank {rank}").write_text(f"{type(error).__name__}\n{traceback.format_exc()}")
        _free_frames(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
