"""Searches a plan: trials, their records, searchers."""
