"""Variational fine-tuning: weights become posteriors, whose KL to the prior is the size of the file."""
