"""From a task to head scales: folds, searches, acceptance, the state on disk."""
