"""`hf-fpdt trace`: a step on the GPU, as a picture."""
