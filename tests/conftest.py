"""Set-up for every test: offline, seeded, one thread, uninitialised memory full of NaN."""

from __future__ import annotations

import os

# Read when huggingface_hub and tokenizers are imported, so before anything imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads sleep while they wait: others are at work on the same cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from tests.helpers.support import nan_filled_empty  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` (or `gpu(n)`) where there are fewer CUDA devices than they need."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        marker = item.get_closest_marker("gpu")
        need = (marker.args[0] if marker.args else 1) if marker else 0
        if need > have:
            item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA device(s), found {have}"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_accelerator_before() -> None:
    """Accelerate keeps the settings of the first Accelerator of a process, and refuses others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """Fill what hf_fpdt allocates without initialising, so that a never-written buffer reaches the result."""
    with nan_filled_empty():
        yield
