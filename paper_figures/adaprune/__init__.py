"""AdaPrune on real weights: MiniLM on other text than it was calibrated on, and a convnet on Fashion-MNIST."""
