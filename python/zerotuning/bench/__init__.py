"""`zerotuning bench`: speed, memory and accuracy beside the peers, in one run."""
