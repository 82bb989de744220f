"""Plugins that Hydra finds by itself: the sweeper of `-m` and experiments, and the launcher of SLURM arrays.

Hydra runs these modules at every start, so they must not import heavy libraries. Hydra does not put them into
sys.modules, so the annotations of their dataclasses must not be strings.
"""
