"""Benchmarks that need a GPU, and estimates of the kernels that need none."""
