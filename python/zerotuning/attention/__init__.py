"""Attention above the operators: the formula as a reference, the encoding of masks, dense masks and packed sequences."""
