"""Training from scratch under masks that make one, two or all three products of a step sparse."""
