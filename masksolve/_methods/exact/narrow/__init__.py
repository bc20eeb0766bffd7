"""Equilibration in lanes of 16-bit integers: the first passes over most tiles."""
