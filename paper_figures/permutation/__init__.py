"""What reordering rows and columns gains, on real weights and on Gaussian ones, and what it could gain at most."""
