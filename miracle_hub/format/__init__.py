"""Bytes ⇄ headers. Knows the layout of files, nothing of what the tensors mean."""
