"""What stands behind `permute_model`."""
