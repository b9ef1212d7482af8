"""Posterior × code → message, and message → weights. Knows nothing of files or models."""
