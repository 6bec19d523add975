"""Log-probabilities of whole rows on several GPUs, for `test_nccl.py`: torchrun --nproc-per-node 2 THIS

Without GPUs it does the same over gloo.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.parallel.test_whole_rows import CASES, step


def main() -> None:
    on_gpu, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        for case in CASES:
            step(case, 2, rank, "ddp", "cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
