"""Training: a run's images are loaded and split, its model is trained, and its folder records and reports it."""
