"""Pictures of head scales and calibrations (matplotlib)."""
