"""Data: real MNIST (`mnist`), text (`text`), and the resumable batches of a training run (`pipeline`)."""
