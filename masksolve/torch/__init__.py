"""Transposable N:M masks for PyTorch."""
