"""Training on Fashion-MNIST under every kind of mask: `python -m paper_figures.training`."""
