"""Callbacks for the training loops of other libraries, each in a module of its own that imports its library.

`masksolve.torch.integrations.transformers` for Hugging Face's Trainer and `masksolve.torch.integrations.lightning` for
Lightning's. Accelerate needs none: docs/loops.md has its loop.
"""
