"""Other people's ways to find transposable masks, each re-implemented here from its published description.

A peer is a module with `solve(tiles, n) -> masks`: float32 tiles (B, m, m) in, boolean masks (B, m, m) out. It gets its
tiles contiguous and is not charged for cutting them from the matrix, as masksolve is.
"""
