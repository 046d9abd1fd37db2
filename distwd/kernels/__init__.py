"""Foreach arithmetic on local tensors; knows nothing of ranks."""
