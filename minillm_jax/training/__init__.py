"""Training: the loss, the optimiser and one step."""
