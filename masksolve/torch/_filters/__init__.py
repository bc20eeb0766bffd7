"""What stands behind `prune_filters`."""
