"""Kinds of posteriors: one file each, behind one protocol."""
