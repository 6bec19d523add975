"""Commands of `hf-fpdt`, one after the other, in the processes of one launch.

accelerate launch ... tests/launched/commands.py '[["finetune", "--model", ...], ["stop", "run", "stopped", "4"], ...]'

"stop" leaves a copy of a run's folder as it is after a stop before the checkpoint of that step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.tensor import DTensor

from hf_fpdt.commands.main import main as command


def stop(run: str, copy: str, step: str) -> int:
    """By the first process, while the others wait."""
    state = PartialState()
    if state.is_main_process:
        shutil.copytree(run, copy)
        shutil.rmtree(Path(copy) / f"checkpoint-{step}")
    state.wait_for_everyone()
    return 0


def sharded(init: Any) -> Any:
    """`AcceleratorState.__init__` on CPUs too: accelerate shards on GPUs alone, in silence; torch does on both."""

    def with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()

    return with_fsdp


def stay(accelerator: Any) -> None:
    """In place of `Accelerator.end_training`, after which no process reaches another one."""
    (model,) = accelerator._models
    assert all(isinstance(weight, DTensor) for weight in model.parameters()) == accelerator.is_fsdp2, "not sharded"
    assert accelerator.is_fsdp2 == (os.environ.get("ACCELERATE_USE_FSDP") == "true")


def main() -> None:
    """The first command that fails ends all."""
    AcceleratorState.__init__ = sharded(AcceleratorState.__init__)
    end, Accelerator.end_training = Accelerator.end_training, stay
    for words in json.loads(sys.argv[1]):
        if status := stop(*words[1:]) if words[0] == "stop" else command(words):
            sys.exit(status)
    end(Accelerator())


if __name__ == "__main__":
    main()
