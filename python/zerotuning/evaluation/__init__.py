"""Scores of labels and texts: forward passes, objectives, accuracy."""
