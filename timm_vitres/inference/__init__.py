"""Models for inference: folded, prepared for this machine, exported as files."""
