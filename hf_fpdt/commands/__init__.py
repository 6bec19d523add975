"""The commands of `hf-fpdt`, one folder each: check, plan, trace, bench, finetune, eval."""
