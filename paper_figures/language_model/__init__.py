"""A small language model made N:M sparse in every way: perplexity, and what it costs."""
