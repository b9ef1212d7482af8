"""Hub ids, the transformers plug-in, model cards. The only part that sees transformers."""
