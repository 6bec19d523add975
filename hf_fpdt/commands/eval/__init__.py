"""`hf-fpdt eval`: what a model or an adapter makes of held-out documents, position by position."""
