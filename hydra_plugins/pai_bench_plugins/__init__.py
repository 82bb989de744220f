"""What Hydra finds here by itself: the sweeper of `-m` and experiments, and the launcher of SLURM arrays.

Hydra runs these modules at every start, so they import nothing heavy; and without registering them, so their
dataclasses must not have annotations that are strings.
"""
