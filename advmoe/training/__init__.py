"""Training methods, losses, the loop and its checkpoints."""
