"""Variational fine-tuning of models as users have them, and the files and repositories they become."""
