"""Structured pruning, once per run: importance, selection, compensation, surgery."""
