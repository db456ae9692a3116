"""Search over training."""
