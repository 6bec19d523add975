"""`hf-fpdt plan`: what a length takes on given GPUs, or the longest that fits."""
