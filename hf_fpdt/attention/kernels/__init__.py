"""Attention kernels: the contract, one file each, and the table."""
