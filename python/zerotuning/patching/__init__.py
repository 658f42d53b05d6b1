"""Switching a transformers model to scaled attention and back, and the scales of its heads."""
