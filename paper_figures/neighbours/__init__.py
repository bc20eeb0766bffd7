"""Two neighbours of the paper on Fashion-MNIST: trainable thresholds and filter pruning, alone and followed by N:M."""
