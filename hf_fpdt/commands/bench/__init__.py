"""`hf-fpdt bench`: steps of this package and of others, side by side."""
