"""Plugins that Hydra finds by itself: the sweeper of `-m` and experiments, the launcher of SLURM arrays,
and the launcher of several runs on this machine.

Hydra runs these modules at every start, so they must not import heavy libraries. Hydra does not put them into
sys.modules, so the annotations of their dataclasses must not be strings.
"""
