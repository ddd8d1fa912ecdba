"""Benchmarks: how much of a norm's cost a fold removes."""
