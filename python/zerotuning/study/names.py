"""The studies' names: apart from the studies, so that the command line knows them without loading torch."""

STUDIES = ("positions", "layers", "heads", "gamma", "robustness", "baselines")
