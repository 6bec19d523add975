"""Copies and host memory, on the CPU: what comes back is what went, and what nobody wrote shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from hf_fpdt.memory import available
from hf_fpdt.memory.available import host_bytes_available
from hf_fpdt.memory.pinned import NEVER_WRITTEN, PinnedMemory
from hf_fpdt.memory.transfers import typed
from hf_fpdt.numerics import accumulation_dtype
from hf_fpdt.plan.placement import HOST_RESERVE
from hf_fpdt.units import GIB, PAGE
from tests.helpers.stores import CPU, transfers
from tests.helpers.support import assert_rejects

SHAPES = [(1,), (3, 5, 7), (1, 13, 2, 8), ()]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]


def sources() -> list[Tensor]:
    """Odd shapes in every dtype, and parts of longer tensors whose memory is in another order."""
    plain = [torch.randn(shape).mul(9).to(dtype) for shape in SHAPES for dtype in DTYPES]
    whole = torch.randn(2, 11, 3, 5)
    return [*plain, whole[:, 3:8], whole.transpose(1, 2), whole[..., ::2], whole[:1].expand(4, -1, -1, -1)]


def assert_round_trips(move: Callable[[Tensor, Tensor], Tensor]) -> None:
    pinned = PinnedMemory(CPU)
    for source in sources():
        buffer = pinned.buffer(source.numel() * source.element_size() + 5)
        back = move(source.clone(), buffer)
        assert back.shape == source.shape and back.dtype == source.dtype
        assert torch.equal(back, source) and back.is_contiguous()
        buffer.zero_()
        assert torch.equal(back, source), "what was fetched is no view of the buffer"


def there_and_back(source: Tensor, buffer: Tensor) -> Tensor:
    moves = transfers()
    copy = moves.to_host(source, buffer)
    fetch = moves.to_device(buffer, source.shape, source.dtype, after=copy)
    copy.settle()
    copy.wait()
    return fetch.tensor()


def test_what_went_to_the_host_comes_back_as_it_was() -> None:
    assert_round_trips(there_and_back)

    def never_sent(source: Tensor, buffer: Tensor) -> Tensor:
        return transfers().to_device(buffer, source.shape, source.dtype, after=None).tensor()

    def first_half(source: Tensor, buffer: Tensor) -> Tensor:
        flat = source.contiguous().flatten()
        transfers().to_host(flat[: len(flat) // 2], buffer)
        return never_sent(source, buffer)

    def as_it_lies(source: Tensor, buffer: Tensor) -> Tensor:
        flat = torch.as_strided(source, (source.numel(),), (1,))
        return there_and_back(flat, buffer).view(source.shape)

    def a_view(source: Tensor, buffer: Tensor) -> Tensor:
        transfers().to_host(source, buffer)
        return typed(buffer, source.shape, source.dtype)

    assert_rejects(
        assert_round_trips,
        {"never sent": never_sent, "half": first_half, "strides ignored": as_it_lies, "a view": a_view},
    )


def test_a_source_may_change_once_its_copy_was_settled() -> None:
    source, buffer = torch.randn(7, 3), PinnedMemory(CPU).buffer(84)
    before, moves = source.clone(), transfers()
    copy = moves.to_host(source.requires_grad_(), buffer)
    copy.settle()
    source.data.fill_(7)
    back = moves.to_device(buffer, source.shape, source.dtype, after=copy).tensor()
    assert torch.equal(back, before) and not back.requires_grad
    copy.settle()


def test_only_the_first_bytes_of_a_longer_buffer_are_touched() -> None:
    buffer = PinnedMemory(CPU).buffer(2 * PAGE)
    transfers().to_host(torch.zeros(3, 5), buffer)
    assert not buffer[:60].any() and (buffer[60:] == NEVER_WRITTEN).all()
    assert typed(buffer, torch.Size((3, 5)), torch.float32).data_ptr() == buffer.data_ptr()


def test_gradients_add_up_in_fp32_or_wider() -> None:
    wide = {dtype: accumulation_dtype(dtype) for dtype in DTYPES[:4]}
    assert wide.pop(torch.float64) == torch.float64 and set(wide.values()) == {torch.float32}


def test_processes_of_a_machine_share_its_memory_and_leave_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 100 * GIB

    files = {"memory.max": "max", "memory.current": "0", "memory.stat": "anon 1"}
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(Path, "exists", lambda path: path.name in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[path.name] + "\n")
    monkeypatch.delitem(os.environ, "LOCAL_WORLD_SIZE", raising=False)
    assert host_bytes_available() == 100 * GIB - HOST_RESERVE
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_bytes_available() == (100 * GIB - HOST_RESERVE) // 4
    files.update({"memory.max": str(50 * GIB), "memory.current": str(10 * GIB)})
    assert host_bytes_available() == (40 * GIB - HOST_RESERVE) // 4, "a container has less"
    files["memory.stat"] = f"anon {GIB}\ninactive_file {5 * GIB}"
    assert host_bytes_available() == (45 * GIB - HOST_RESERVE) // 4, "files that were read may be dropped"
    files["memory.current"] = str(54 * GIB)
    assert host_bytes_available() == 0


def limits(root: Path, own: str) -> list[int]:
    return list(available._container_bytes_available(root, own))


def group(folder: Path, **files: str) -> None:
    """Files `memory.NAME`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"stat": "anon 1\nfile 2", **files}.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_limits_of_the_groups_around_a_process_count(tmp_path: Path) -> None:
    """As Slurm sets them: on a group of the job, above the process's own."""
    (tmp_path / "memory.stat").write_text("anon 1\n")  # the root has no limit
    group(tmp_path / "job", max="1000", current="300", stat="inactive_file 50")
    group(tmp_path / "job" / "step", max="max", current="100")
    group(tmp_path / "other", max="10", current="0")
    assert limits(tmp_path, "0::/job/step\n") == [750]
    assert limits(tmp_path, "0::/\n") == limits(tmp_path, "") == []
    group(tmp_path / "job" / "step", max="200", current="200")
    assert sorted(limits(tmp_path, "0::/job/step\n")) == [0, 750], "nothing left is a limit"


def test_limits_of_control_groups_of_version_1_count(tmp_path: Path) -> None:
    job = tmp_path / "memory" / "slurm" / "job"
    group(job, limit_in_bytes="1000", usage_in_bytes="300", stat="total_inactive_file 20")
    own = "12:cpu,cpuacct:/slurm/job\n5:memory:/slurm/job\n1:name=systemd:/\n0::/\n"
    assert limits(tmp_path, own) == [720]
