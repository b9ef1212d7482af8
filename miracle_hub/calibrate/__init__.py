"""Compression that knows the model: what it is run on, and what its answers say of its weights."""
