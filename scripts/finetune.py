"""`hf-fpdt finetune` as a script, for launchers that want a file: accelerate launch scripts/finetune.py …"""

import sys

from hf_fpdt.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
