"""The names of the benchmarks, in a module that the command line can import without loading torch."""

BENCHMARKS = ("attention", "decode", "calibration", "search", "sensitivity")
