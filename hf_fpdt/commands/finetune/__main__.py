"""`accelerate launch -m hf_fpdt.commands.finetune …` is `hf-fpdt finetune …` in several processes."""

import sys

from ..main import main

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
