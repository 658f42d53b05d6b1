"""Attention with a scaled initial token above the operators: the formula as a reference, masks and packed sequences."""
