"""Publishing: models are saved as folders with config and card, converted from checkpoints, pushed and verified."""
