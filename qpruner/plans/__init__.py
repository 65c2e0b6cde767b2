"""Plans: a bit-width for every group, and their bytes."""
