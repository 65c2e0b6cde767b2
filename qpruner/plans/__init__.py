"""Define precision plans: a format for every group of a model, and the bytes that result."""
