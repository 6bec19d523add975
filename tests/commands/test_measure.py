"""Rates are amounts over seconds; that they come from a GPU is for a GPU to show."""

from __future__ import annotations

import pytest
import torch

from hf_fpdt.commands.measure import Sizes, link_rates, measured, rate_of
from hf_fpdt.forecast.rates import GPUS

CPU = torch.device("cpu")
SMALL = Sizes(matrix=64, tokens=64, copied_bytes=2**20, seconds=0.01)


class Clock:
    """Time that goes on by calls alone: the first one takes long, as where something is compiled."""

    TOOK = 1 / 64

    def __init__(self) -> None:
        self.calls, self.now = 0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.TOOK if self.calls else 100.0
        self.calls += 1


def test_a_rate_is_the_amount_of_one_call_over_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, calls in ((10 * Clock.TOOK, 10), (0.5 * Clock.TOOK, 1)):
        clock = Clock()
        monkeypatch.setattr("hf_fpdt.commands.measure.time", clock)
        assert rate_of(10.0, clock.run, CPU, seconds) == 640
        assert clock.calls == 2 + calls, "two to warm up, then as many as the seconds hold"


def test_every_rate_is_measured() -> None:
    gpu = measured(CPU, torch.float32, sizes=SMALL, name="Card 9000", note="today")
    rates = [gpu.memory_gib, gpu.peak, gpu.matmul, gpu.memory, gpu.link, *gpu.attention[64], *gpu.attention[128]]
    assert all(0 < rate < float("inf") for rate in rates) and sorted(gpu.attention) == [64, 128]
    assert gpu.peak == gpu.matmul and "Card 9000, today; MFU against its own" in gpu.source
    assert gpu.peers == gpu.network == gpu.link


def test_a_known_card_keeps_the_peak_of_its_data_sheet() -> None:
    gpu = measured(CPU, torch.float32, sizes=SMALL, name="NVIDIA H100 80GB HBM3", note="today")
    assert gpu.peak == GPUS["h100"].peak and "MFU" not in gpu.source
    assert (gpu.peers, gpu.network) == (GPUS["h100"].peers, GPUS["h100"].network)


@pytest.mark.gpu
def test_a_gpu_is_faster_than_its_link_and_slower_than_its_data_sheet() -> None:
    device = torch.device("cuda")
    sizes = Sizes(seconds=0.2)
    gpu = measured(device, torch.bfloat16, sizes=sizes, name=torch.cuda.get_device_name(), note="today")
    to_device, back = link_rates(device, sizes)
    assert min(to_device, back) > 5e9 and gpu.link < gpu.memory / 5
    assert all(1e13 < rate <= 1.05 * gpu.peak for rate in (gpu.matmul, *gpu.attention[128]))
