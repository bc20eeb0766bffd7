"""AdaPrune: a trained model pruned, and repaired layer by layer."""
