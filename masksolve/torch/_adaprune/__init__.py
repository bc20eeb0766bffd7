"""AdaPrune: a trained model pruned, and re-fitted layer by layer."""
