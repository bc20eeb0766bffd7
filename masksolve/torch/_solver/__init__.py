"""Masks of tensors where they are: on the CPU, or as kernels on the device."""
