"""Training: data, the loss, the optimiser, steps, checkpoints and the loop."""
