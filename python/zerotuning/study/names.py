"""The names of the studies, in a module that the command line can import without loading torch."""

STUDIES = ("positions", "layers", "heads", "gamma", "robustness", "baselines")
