"""`hf-fpdt finetune`: adapt a model to long texts, LoRA or full, and say what came of it.

In the order they are read: options and trainer_options (what may be chosen), output (the folder, and going on in
it), base_model and rope (the model), sources, tables, skipped and windows (the data), run (the work), steps (what is
printed meanwhile), facts, card and merge (what is written at the end).
"""
