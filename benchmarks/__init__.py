"""Benchmarks of masksolve against every other way to find transposable N:M masks."""
