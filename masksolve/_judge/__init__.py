"""The judge's kernels: what masks keep, and whether potentials prove them optimal (docs/proof.md)."""
