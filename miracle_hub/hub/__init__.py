"""Hub ids, pushes, model cards and plots. Imports no transformers."""
