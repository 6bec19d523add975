"""Exact training of Hugging Face decoders on sequences of millions of tokens (FPDT, arXiv 2408.16978)."""
