"""Training: configuration, optimizer, sharding, the step, the loop, checkpoints, metrics."""
