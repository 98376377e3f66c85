"""Benchmarks of a real pool, each figure beside its peers of the same run."""
