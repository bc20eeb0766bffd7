"""Training with masks: the Sparsifier and what it is made of."""
