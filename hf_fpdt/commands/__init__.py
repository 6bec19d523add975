"""Commands of `hf-fpdt` that are folders: `finetune` trains on long texts, `eval` measures the loss by position."""
