"""What stands behind `masksolve.torch.dynamic`."""
