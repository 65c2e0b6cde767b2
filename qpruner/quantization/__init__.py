"""Quantize weights with LoftQ, store the packed groups in a bank, and assemble the model of a plan."""
