"""NCCL: a world of one process runs the same groups, loaders and exchanges as many; two equal the plain model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt
from hf_fpdt.commands.bench.children import LAUNCHER
from hf_fpdt.parallel.group import SequenceParallelGroup
from tests.helpers.support import relative_error
from tests.helpers.truth import loss_and_gradients, tiny
from tests.parallel.test_sequence_parallel import sample, stacked

RANKS = Path(__file__).parents[1] / "launched" / "nccl_ranks.py"
WHOLE_ROWS = RANKS.with_name("whole_rows.py")


@pytest.mark.gpu
def test_gpu_one_process_over_nccl_equals_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchanges are forced through NCCL (a group of one would hand its input back) and change nothing."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        group = SequenceParallelGroup(1, 0, dist.group.WORLD)
        x = torch.randn(2, 8, 4, 16, device="cuda")
        assert torch.equal(group._exchange(x), x)
        model = tiny("llama").float().cuda()
        batch = {name: value.cuda() for name, value in ShardingCollator(stacked, 1, 0, 16)([sample(0, 63)]).items()}
        plain = loss_and_gradients(model, batch["input_ids"], stacked([sample(0, 63)])["labels"].cuda())
        apply_fpdt(model, FPDTPlugin(chunk_tokens=16, kernel="math"))
        model.zero_grad()
        wrapped = DistributedDataParallel(model, device_ids=[0])
        wrapped(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            assert relative_error(parameter.grad, plain[name]) < 1e-4, name
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu(2)
def test_gpu_two_processes_equal_the_plain_model(tmp_path: Path) -> None:
    """Ulysses and data parallel, FSDP2 and DDP, few key heads and one; three broken ways are seen to be broken."""
    out = tmp_path / "rows.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(RANKS.parents[2])}
    subprocess.run([*LAUNCHER, "--nproc-per-node", "2", RANKS, out], check=True, env=environment, timeout=600)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 16
    for row in rows:
        assert row["passed"] is not row["case"].startswith("wrong"), row


@pytest.mark.gpu(2)
def test_gpu_two_processes_find_what_whole_logits_say() -> None:
    """Whole rows on every rank, cut by the model: each family and kind of rows, over NCCL."""
    environment = {**os.environ, "PYTHONPATH": str(RANKS.parents[2])}
    subprocess.run([*LAUNCHER, "--nproc-per-node", "2", WHOLE_ROWS], check=True, env=environment, timeout=600)
