"""The file tier keeps bytes exactly, uses places again, reports what the kernel refuses and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_fpdt.memory import disk
from hf_fpdt.memory.disk import PAGE, DiskEntry, DiskFile, free_bytes

MIB = 2**20
SIZES = (1, PAGE - 1, PAGE, PAGE + 1, 3 * MIB + 5)

# The module alone, as it knows nothing of the package: importing that takes a child ten times as long.
CHILD = f"""
import importlib.util, os, resource, sys, threading, time
import torch
spec = importlib.util.spec_from_file_location("disk", {disk.__file__!r})
disk = importlib.util.module_from_spec(spec)
sys.modules["disk"] = disk
spec.loader.exec_module(disk)
folder = sys.argv[1]
"""


def staging(nbytes: int, shift: int = 0) -> Tensor:
    """A buffer that starts `shift` bytes after the start of a page."""
    memory = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE + shift
    return memory[start : start + nbytes]


def random_bytes(nbytes: int, shift: int = 0) -> Tensor:
    return staging(nbytes, shift).random_(0, 256)


def read(file: DiskFile, entry: DiskEntry, shift: int = 0) -> Tensor:
    buffer = staging(entry.nbytes, shift).fill_(7)
    file.read(entry, buffer).wait()
    return buffer


def takes_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def start_child(code: str, folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CHILD + code, str(folder)], stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DiskFile]:
    file = DiskFile(tmp_path / "new" / "folder")
    yield file
    file.close()
    assert not list((tmp_path / "new" / "folder").iterdir())


@pytest.mark.parametrize("shift", [0, 1, 512])
@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back(file: DiskFile, nbytes: int, shift: int) -> None:
    data = random_bytes(nbytes, shift)
    kept = data.clone()
    entry = file.write(data)
    entry.wait()
    assert torch.equal(data, kept), "writing changed the caller's buffer"
    data.zero_()
    # Each path reads what the other wrote.
    assert entry.nbytes == nbytes and entry.direct == (file.direct and not shift)
    assert torch.equal(read(file, entry), kept) and torch.equal(read(file, entry, shift=3), kept)


def test_reading_changes_nothing_beside_the_buffer(file: DiskFile) -> None:
    around = staging(4 * PAGE).fill_(9)
    entry = file.write(random_bytes(PAGE + 1))
    file.read(entry, around[PAGE : 2 * PAGE + 1]).wait()
    assert (around[:PAGE] == 9).all() and (around[2 * PAGE + 1 :] == 9).all()


@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_direct_is_what_the_file_system_takes(tmp_path: Path, folder: str) -> None:
    """A disk's file system takes it; that in memory did not before Linux 6.6."""
    place = tmp_path if folder == "disk" else Path("/dev/shm")
    if not place.is_dir():
        pytest.skip("no file system in memory")
    file = DiskFile(place)
    assert file.direct == takes_direct(place) and file.file_bytes == 0
    data = random_bytes(3 * PAGE + 7)
    assert torch.equal(read(file, file.write(data)), data)
    file.close()


def test_without_direct_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    file = DiskFile(tmp_path)
    data = random_bytes(MIB + 5)
    entry = file.write(data)
    assert not file.direct and not entry.direct
    assert torch.equal(read(file, entry), data)
    file.close()


@pytest.mark.parametrize("at_most", [PAGE, 5 * PAGE, 3 * PAGE + 100])
def test_calls_that_move_less_than_asked_are_continued(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    """The kernel moves at most 2 GiB a call and may stop anywhere; here it does so after a few pages."""

    def short(call: Callable[..., int]) -> Callable[..., int]:
        def moved(fd: int, views: list[memoryview], offset: int) -> int:
            left, given = -(-at_most // PAGE) * PAGE, []  # whole pages go to the kernel, as it may refuse others
            for view in views:
                given.append(view[:left])
                left -= len(given[-1])
            return min(at_most, call(fd, [view for view in given if view], offset))

        return moved

    for name in ("pwritev", "preadv"):
        monkeypatch.setattr(os, name, short(getattr(os, name)))
    data = random_bytes(17 * PAGE + 33)
    assert torch.equal(read(file, file.write(data)), data)


@pytest.mark.parametrize("order", ["fifo", "lifo", "random"])
def test_many_entries_in_any_order(file: DiskFile, order: str) -> None:
    generator = random.Random(0)
    data = [random_bytes(generator.randrange(1, 40 * PAGE)) for _ in range(60)]
    entries = [file.write(part) for part in data]
    index = list(range(60))
    if order == "lifo":
        index.reverse()
    elif order == "random":
        generator.shuffle(index)
    buffers = {i: staging(data[i].numel()) for i in index}
    transfers = {i: file.read(entries[i], buffers[i]) for i in index}
    for i in index:
        transfers[i].wait()
        assert torch.equal(buffers[i], data[i])
        file.free(entries[i])
    assert file.used_bytes == 0


def test_places_are_used_again(file: DiskFile) -> None:
    sizes = (1, PAGE + 1, 5 * PAGE, PAGE + 2, 3)
    for _ in range(5):
        data = [random_bytes(nbytes) for nbytes in sizes]
        entries = [file.write(part) for part in data]
        assert file.used_bytes == file.peak_bytes == file.file_bytes == 11 * PAGE
        for part, entry in zip(data, entries, strict=True):
            assert torch.equal(read(file, entry), part)
            file.free(entry)
        assert file.used_bytes == 0


def test_the_smallest_place_that_holds_it_is_taken(file: DiskFile) -> None:
    entries = [file.write(random_bytes(pages * PAGE)) for pages in (8, 2, 4)]
    for entry in entries:
        file.free(entry)
    file.write(random_bytes(3 * PAGE))
    file.write(random_bytes(7 * PAGE))
    assert file.file_bytes == 14 * PAGE and file.used_bytes == 10 * PAGE
    file.write(random_bytes(3 * PAGE))
    assert file.file_bytes == 17 * PAGE, "places of 4 and 8 pages are taken, that of 2 holds no 3"


def test_free_waits_for_nobody_and_its_place_for_its_readers(file: DiskFile) -> None:
    first, second, go = random_bytes(PAGE), random_bytes(PAGE), threading.Event()
    entry, buffer = file.write(first), staging(PAGE)
    late = file.read(entry, buffer, ready=lambda: _arrives(go))
    file.free(entry)
    after = file.write(second)
    assert file.file_bytes == PAGE
    go.set()
    late.wait()
    assert torch.equal(buffer, first) and torch.equal(read(file, after), second)


def _arrives(event: threading.Event) -> None:
    """Wait until it is set, and long enough for whoever does not wait to be too early."""
    assert event.wait(60)
    time.sleep(0.1)


def test_bytes_that_arrive_late_are_the_ones_written(file: DiskFile) -> None:
    buffer, data, go = staging(PAGE + 5).zero_(), random_bytes(PAGE + 5), threading.Event()

    def ready() -> None:
        _arrives(go)
        buffer.copy_(data)

    entry = file.write(buffer, ready)
    back = staging(PAGE + 5)
    transfer = file.read(entry, back)  # starts while the write still waits
    go.set()
    transfer.wait()
    assert torch.equal(back, data)


def test_a_buffer_in_use_is_not_filled(file: DiskFile) -> None:
    entry, buffer, seen = file.write(random_bytes(PAGE)), staging(PAGE).fill_(7), []
    go = threading.Event()

    def ready() -> None:
        _arrives(go)
        seen.append(buffer.clone())

    transfer = file.read(entry, buffer, ready)
    entry.wait()
    go.set()
    transfer.wait()
    assert (seen[0] == 7).all()


def test_what_fails_is_said_by_the_entry_its_reads_and_the_next_write(file: DiskFile) -> None:
    def ready() -> None:
        raise RuntimeError("the copy failed")

    entry = file.write(staging(PAGE), ready)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the copy failed"):
            entry.wait()
    with pytest.raises(RuntimeError, match="the copy failed"):
        file.read(entry, staging(PAGE)).wait()
    with pytest.raises(RuntimeError, match="the copy failed"):
        file.write(staging(PAGE))
    file.free(entry)
    data = random_bytes(PAGE)
    assert torch.equal(read(file, file.write(data)), data) and file.file_bytes == PAGE


@pytest.mark.parametrize("what", ["free", "read"])
def test_an_entry_is_freed_once_and_not_read_after(file: DiskFile, what: str) -> None:
    entry = file.write(random_bytes(5))
    file.free(entry)
    with pytest.raises(RuntimeError, match=f"DiskFile.{what}: the entry of 5 bytes was freed before"):
        file.free(entry) if what == "free" else file.read(entry, staging(5))
    assert file.used_bytes == 0


def test_an_entry_is_of_one_file(file: DiskFile, tmp_path: Path) -> None:
    other = DiskFile(tmp_path)
    entry = other.write(random_bytes(5))
    with pytest.raises(RuntimeError, match="another DiskFile"):
        file.read(entry, staging(5))
    with pytest.raises(RuntimeError, match="another DiskFile"):
        file.free(entry)
    other.close()


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(4), torch.zeros(8, dtype=torch.uint8)[::2], torch.zeros(2, 2, dtype=torch.uint8)],
    ids=["float", "strided", "matrix"],
)
def test_other_buffers_are_refused(file: DiskFile, buffer: Tensor) -> None:
    entry = file.write(random_bytes(4))
    for start in (lambda: file.write(buffer), lambda: file.read(entry, buffer)):
        with pytest.raises(ValueError, match="pass contiguous 1-D torch.uint8 on the CPU"):
            start()
    with pytest.raises(ValueError, match="a buffer of 5 bytes for 4"):
        file.read(entry, staging(5))


def test_close_ends_the_writes_and_all_else(tmp_path: Path) -> None:
    file, wrote = DiskFile(tmp_path), threading.Event()

    def ready() -> None:
        time.sleep(0.1)
        wrote.set()

    entry = file.write(random_bytes(PAGE), ready=ready)
    file.close()
    assert wrote.is_set() and file.used_bytes == file.file_bytes == 0 and file.peak_bytes == PAGE
    file.close()
    entry.wait()
    for use in (lambda: file.write(staging(1)), lambda: file.read(entry, staging(PAGE))):
        with pytest.raises(RuntimeError, match="is closed; make a new DiskFile"):
            use()
    file.free(entry)  # who holds it may go after the file
    assert file.used_bytes == 0


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for folder in (tmp_path / "plain", tmp_path / "plain" / "inside", Path("/proc/self")):
        with pytest.raises(OSError, match=f"disk_dir={folder} takes no file .* name a folder"):
            DiskFile(folder)


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(status.f_bavail * status.f_frsize, rel=0.1)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_full_disk_is_reported(tmp_path: Path, shift: int) -> None:
    """The kernel refuses the file's second MiB (a limit of this process; Python ignores the signal)."""
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))
file = disk.DiskFile(folder)
buffer = torch.zeros({3 * MIB} + 2 * disk.PAGE, dtype=torch.uint8)
start = -buffer.data_ptr() % disk.PAGE + {shift}
entry = file.write(buffer[start : start + {3 * MIB} + 5])
for use in (entry.wait, lambda: file.read(entry, buffer[: entry.nbytes]).wait(), lambda: file.write(buffer)):
    try:
        use()
    except OSError as error:
        print(error.errno, error)
file.close()
"""
    child = start_child(code, tmp_path)
    out, err = child.communicate(timeout=120)
    lines = out.splitlines()
    assert child.returncode == 0 and len(lines) == 3, err
    for line in lines:
        assert line.startswith("27 ") and f"cannot write {3 * MIB + 5} bytes" in line
        assert f"disk_dir={tmp_path} (File too large), where " in line and "bytes are free; take another" in line
        assert 'checkpoints="segment"' in line
    assert not list(tmp_path.iterdir())


def test_nothing_stays_after_an_exit_without_close(tmp_path: Path) -> None:
    code = """
file = disk.DiskFile(folder)
entries = [file.write(torch.ones(2**20, dtype=torch.uint8), ready=lambda: time.sleep(0.1)) for _ in range(6)]
print("written")
"""
    child = start_child(code, tmp_path)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (0, "written\n", "")
    assert not list(tmp_path.iterdir())


def test_nothing_stays_after_sigkill(tmp_path: Path) -> None:
    code = """
file = disk.DiskFile(folder)
for i in range(10**9):
    entry = file.write(torch.ones(2**20, dtype=torch.uint8))
    if i == 8:
        print("writing", flush=True)
    if i >= 8:
        entry.wait()
        file.free(entry)
"""
    child = start_child(code, tmp_path)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    # The child does hold a file of this folder, with bytes in it.
    held = [fd for fd in Path(f"/proc/{child.pid}/fd").iterdir() if str(tmp_path) in os.readlink(fd)]
    assert held and all(fd.stat().st_size > 0 for fd in held)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())
