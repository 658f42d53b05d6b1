"""The package's version: read by CMake and setup.py too."""

__version__ = "0.1.0"
