"""`hf-fpdt check`: is FPDT right on this machine, for this model?"""
