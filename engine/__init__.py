"""Training, checkpoints, losses and evaluation loops."""
