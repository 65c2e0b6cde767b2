"""Rows, tokens, losses and measures."""
