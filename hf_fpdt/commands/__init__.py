"""The commands of `hf-fpdt`, one folder each: check, plan, trace, bench, finetune, eval."""

import logging

# When PEFT imports it, it says which kernels it lacks, whether or not anything is quantised.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
