"""Figure 1 of arXiv 2512.12602: EFLA and DeltaNet on sequential MNIST under corruption."""
