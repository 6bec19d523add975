"""Chosen experts as one operation: see `replace`."""
