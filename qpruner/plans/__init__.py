"""Define precision plans: a bit-width for every group of a model, and the bytes that result."""
