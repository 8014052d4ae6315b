"""Evaluation: accuracy and loss of a classifier, on clean and on corrupted digits."""
