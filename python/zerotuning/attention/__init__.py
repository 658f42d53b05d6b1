"""Attention above the operators: the formula as a reference, encoded masks, dense masks and packed sequences."""
