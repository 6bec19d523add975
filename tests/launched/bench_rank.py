"""A rank of `hf-fpdt bench` without its imports, as torch's launcher starts it: bench_rank.py JOB RESULT.

It says its process id in the file that is the job's model. What it does then, the job's stack says: "killed" or "ends"
on rank 1, or both ranks wait, like one that computes.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

LIFELINE = Path(__file__).parents[2] / "hf_fpdt" / "commands" / "bench" / "lifeline.py"


def main() -> None:
    if not runpy.run_path(str(LIFELINE))["is_wanted"]():
        return
    job, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    what = json.loads(job.read_text())["stack"]
    pids = Path(json.loads(job.read_text())["model"])
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    # The launcher ends the other rank at once: before it has said its id, if it was slow to start.
    while rank == 1 and len(pids.read_text().splitlines()) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    if rank == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "ends":
        raise SystemExit(3)
    time.sleep(900)  # longer than any test waits for it to be ended


if __name__ == "__main__":
    main()
