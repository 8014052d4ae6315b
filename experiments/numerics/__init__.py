"""Numerical study: error of the op against float64, and training in each type."""
