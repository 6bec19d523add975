"""What importing the package and `hf-fpdt plan` leave out: packages that nothing asked for, and what those say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.quantised import FAMILIES, tiny_plain

CODE = """
import sys
import hf_fpdt
unasked = {"peft", "bitsandbytes", "transformers.trainer"} & sys.modules.keys()
assert not unasked, unasked
assert set(hf_fpdt.__all__) <= set(dir(hf_fpdt)) and not hasattr(hf_fpdt, "FPDTTrainers")
from hf_fpdt.commands.main import main
from transformers.utils import logging
before = logging.get_verbosity()
code = main(["plan", sys.argv[1], *"--host-mem 128 --seq-len 8K --json".split()])
assert logging.get_verbosity() == before
from hf_fpdt import FPDTTrainer
assert issubclass(FPDTTrainer, sys.modules["transformers"].Trainer)
sys.exit(code)
"""


def test_a_plan_says_nothing_of_packages_that_this_machine_lacks(tmp_path: Path) -> None:
    """PEFT imports bitsandbytes, which takes seconds and warns on a CPU; transformers warns of a scan's kernels."""
    assert "linear_attention" in FAMILIES["qwen3_5_text"]["layer_types"]
    tiny_plain("qwen3_5_text", max_position_embeddings=8192).config.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "peak_device_bytes" in done.stdout
