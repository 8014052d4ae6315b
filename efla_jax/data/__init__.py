"""Data: real MNIST (`mnist`) and the resumable batches of a training run (`pipeline`)."""
