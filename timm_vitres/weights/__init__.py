"""Weights: files and checkpoints are found, downloaded, checked, read, converted to our layout and compared."""
