"""LoftQ, the bank of packed groups, and the assembly of a plan's model."""
