"""Benchmarks that are run where a GPU is at hand, and what can be told of the kernel without one."""
