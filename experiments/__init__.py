"""Runnable studies and benchmarks; each folder has a README with its command and result."""
