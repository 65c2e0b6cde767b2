"""Read rows, encode them as tokens, run them through a model, and compute losses and statistics."""
